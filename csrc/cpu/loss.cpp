#include "loss.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "arrange.h"

namespace cmim::cpu {
namespace {

// Kept between calls up to this size, so that a training loop does not return pages to the system at every
// step.
constexpr int64_t kKeptBytes = int64_t(4) << 20;
void release(Scratch& scratch) {
  std::free(scratch.data);
  scratch = Scratch{};
}
struct ThreadWorkspace : Workspace {
  ~ThreadWorkspace() { release(pass), release(carry); }
};
Workspace& workspace() {
  static thread_local ThreadWorkspace ws;
  return ws;
}
void trim(Workspace& ws) {
  for (Scratch* scratch : {&ws.pass, &ws.carry})
    if (scratch->bytes > kKeptBytes) release(*scratch);
}

int64_t bytes_of(Storage storage) {
  static constexpr int64_t kBytes[] = {4, 8, 2, 2};
  return kBytes[int(storage)];
}

// One call: the request with its groups and normalisers, and the kernel's view of it.
struct Plan {
  const Request& q;
  const Pool& pool;
  Groups groups;
  Grid grid;
  std::vector<double> coeff, row_ce, row_cmi, kl;
  double ce_norm = 1, cmi_norm = 1;
  Job job{};

  Plan(const Request& request, const Pool& p)
      : q(request), pool(p), groups(group(request)), grid(make_grid(request)) {
    const bool spectrum = q.reduction == Reduction::spectrum;
    const auto weight = [&](int64_t c) {
      if (!q.class_weight) return 1.0;
      return q.storage == Storage::f64 ? static_cast<const double*>(q.class_weight)[c]
                                       : double(static_cast<const float*>(q.class_weight)[c]);
    };
    if (q.reduction == Reduction::mean || spectrum) {
      ce_norm = 0;
      for (size_t c = 0; c < groups.labels.size(); ++c)
        ce_norm += weight(groups.labels[c]) * double(groups.count(c));
      if (ce_norm == 0) ce_norm = std::numeric_limits<double>::quiet_NaN();  // as F.cross_entropy has it
      cmi_norm = double(groups.rows.size());
    }
    job.logits = q.logits;
    job.storage = q.storage;
    job.rows = q.rows, job.classes = q.classes, job.row_stride = q.row_stride, job.col_stride = q.col_stride;
    job.temperatures = int(grid.a.size());
    job.a = grid.a.data(), job.w = grid.w.data(), job.order = grid.order.data();
    job.base = grid.base, job.multiple = grid.multiple.empty() ? nullptr : grid.multiple.data();
    job.power0 = grid.power0, job.ce_index = grid.ce_index;
    job.class_weight = q.class_weight, job.centroids = q.centroids;
    job.has_ce = !spectrum && q.ce_weight != 0;
    job.has_cmi = spectrum || q.cmi_weight != 0;
    job.ce_scale = q.ce_weight / ce_norm;
    job.smoothing = q.label_smoothing, job.smooth_each = q.label_smoothing / double(q.classes);
    job.weight_sum = double(q.classes);
    if (q.class_weight && q.label_smoothing > 0) {
      job.weight_sum = 0;
      for (int64_t c = 0; c < q.classes; ++c) job.weight_sum += weight(c);
    }
    coeff.assign(grid.a.size(), 0.0);
    set_weights(spectrum ? std::vector<double>(grid.a.size(), 0.0) : q.w, q.cmi_weight);
  }

  // The gradient of sum_k weight_k CMI_k * scale, weights in the caller's order.
  void set_weights(const std::vector<double>& weight, double scale) {
    for (size_t k = 0; k < coeff.size(); ++k) {
      grid.w[k] = weight[size_t(grid.order[k])];
      coeff[k] = grid.w[k] * grid.a[k] * scale / cmi_norm;
    }
    job.coeff = coeff.data();
  }

  void want_values() {
    row_ce.assign(groups.rows.size(), 0.0);
    row_cmi.assign(groups.rows.size(), 0.0);
    job.row_ce = row_ce.data();
    job.row_cmi = row_cmi.data();
    if (q.reduction != Reduction::spectrum) return;
    kl.assign(groups.rows.size() * grid.a.size(), 0.0);
    job.kl = kl.data(), job.kl_stride = int(grid.a.size());
  }

  // Clusters without any CMI, for which the cross entropy is all there is.
  bool alone(size_t c) const {
    return !job.has_cmi || (!job.centroids && (groups.count(c) == 1 || q.classes == 1));
  }

  Cluster cluster(size_t c) const {
    return {groups.rows.data() + groups.begin[c], groups.begin[c], groups.count(c), groups.labels[c]};
  }

  void run();
};

// Which thread takes what never changes a result: every cluster and every row is computed the same way by
// anyone.
constexpr double kRowWork = 64;      // what a row costs beside its logits, in logits
constexpr double kSerialWork = 1e5;  // logits times temperatures that are not worth waking a thread for
constexpr double kSharedWork = 1e6;  // a cluster of at least this much may be worked on by all threads
constexpr double kGathered = 3e4;    // single rows are handed out by so much

void Plan::run() {
  const Variant& kernel = variant();
  const double logits = double(q.classes) + kRowWork;
  struct Item {
    size_t first, last;  // clusters; all of them single rows where there are several
    double cost;
  };
  std::vector<Item> items;
  std::vector<size_t> shared;
  double work = 0, separate = 0;  // of all clusters, and of those in items
  const auto cost_of = [&](size_t c) {
    return double(groups.count(c)) * logits * (alone(c) ? 2 : job.temperatures + 1);
  };
  for (size_t c = 0; c < groups.labels.size(); ++c) work += cost_of(c);
  const bool serial = pool.threads == 1 || work < kSerialWork;
  for (size_t c = 0; c < groups.labels.size(); ++c) {
    const double cost = cost_of(c);
    if (!serial && !alone(c) && cost > kSharedWork && cost * pool.threads * 2 > work) {
      shared.push_back(c);
      continue;
    }
    separate += cost;
    if (alone(c) && !items.empty() && alone(items.back().first) && items.back().cost < kGathered) {
      items.back().last = c + 1;
      items.back().cost += cost;
    } else {
      items.push_back({c, c + 1, cost});
    }
  }
  for (size_t c : shared) {
    kernel.cluster(job, cluster(c), Team{pool.run}, workspace());
    trim(workspace());
  }

  auto compute = [&](const Item& item, Workspace& ws) {
    for (size_t c = item.first; c < item.last; ++c) {
      const Cluster cl = cluster(c);
      if (alone(c))
        kernel.entropy(job, cl, ws);
      else
        kernel.cluster(job, cl, Team{nullptr}, ws);
    }
  };
  if (serial || items.size() < 2) {
    for (const Item& item : items) compute(item, workspace());
    trim(workspace());
  } else {
    // A worker begins with its own share, the same in every call, so that its cache may still hold the rows;
    // then it takes from the others' what they have not come to.
    struct alignas(64) Share {
      std::atomic<size_t> next{0};
      size_t end = 0;
    };
    const size_t workers = std::min(size_t(pool.threads), items.size());
    std::vector<Share> shares(workers);
    double done = 0;
    size_t at = 0;
    for (size_t s = 0; s < workers; ++s) {
      shares[s].next = at;
      while (at < items.size() &&
             (s + 1 == workers || done + items[at].cost / 2 < separate * double(s + 1) / double(workers)))
        done += items[at++].cost;
      shares[s].end = at;
    }
    auto worker = [&](int64_t w) {
      Workspace& ws = workspace();
      for (size_t s = 0; s < workers; ++s) {
        Share& share = shares[(size_t(w) + s) % workers];
        for (size_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
          compute(items[i], ws);
      }
      trim(ws);
    };
    using Worker = decltype(worker);
    pool.run(int64_t(workers), [](void* w, int64_t i) { (*static_cast<Worker*>(w))(i); }, &worker);
  }
  if (!job.grad) return;
  const size_t row_bytes = size_t(q.classes * bytes_of(job.grad_storage));
  for (int64_t row : groups.ignored)
    std::memset(static_cast<char*>(job.grad) + size_t(row) * row_bytes, 0, row_bytes);
}

}  // namespace

void forward(const Request& q, const Pool& pool, std::vector<double>& value, void* grad,
             Storage grad_storage) {
  Plan plan(q, pool);
  plan.want_values();
  plan.job.grad = grad;
  plan.job.grad_storage = grad_storage;
  plan.run();
  const size_t K = q.a.size();
  if (q.reduction == Reduction::spectrum) {
    value.assign(K, 0.0);
    for (size_t i = 0; i < plan.kl.size(); ++i) value[i % K] += plan.kl[i];
    for (double& v : value) v /= plan.cmi_norm;
    return;
  }
  if (q.reduction == Reduction::none) {
    value.assign(size_t(q.rows), 0.0);
    for (size_t at = 0; at < plan.groups.rows.size(); ++at)
      value[size_t(plan.groups.rows[at])] = (q.ce_weight != 0 ? q.ce_weight * plan.row_ce[at] : 0.0) +
                                            (q.cmi_weight != 0 ? q.cmi_weight * plan.row_cmi[at] : 0.0);
    return;
  }
  double ce = 0, cmi = 0;
  for (size_t at = 0; at < plan.groups.rows.size(); ++at) ce += plan.row_ce[at], cmi += plan.row_cmi[at];
  // a term of weight zero is left out; else no kept row is 0 / 0 for the mean
  double total = 0;
  if (q.ce_weight != 0) total += q.ce_weight * (ce / plan.ce_norm);
  if (q.cmi_weight != 0) total += q.cmi_weight * (cmi / plan.cmi_norm);
  value.assign(1, total);
}

void backward(const Request& q, const Pool& pool, const std::vector<double>& upstream, void* grad,
              Storage grad_storage) {
  Plan plan(q, pool);
  plan.job.grad = grad;
  plan.job.grad_storage = grad_storage;
  if (q.reduction == Reduction::none) {
    plan.job.upstream = upstream.data();
  } else if (q.reduction == Reduction::spectrum) {
    plan.set_weights(upstream, 1.0);
  } else {
    plan.set_weights(q.w, q.cmi_weight * upstream[0]);
    plan.job.ce_scale *= upstream[0];
  }
  plan.run();
}

void class_centroids(const Request& q, const Pool& pool, void* out, int64_t* counts) {
  Plan plan(q, pool);
  const Groups& groups = plan.groups;
  for (size_t c = 0; c < groups.labels.size(); ++c) counts[groups.labels[c]] = groups.count(c);
  struct Each {
    Plan& plan;
    void* out;
  } each{plan, out};
  pool.run(
      int64_t(groups.labels.size()),
      [](void* arg, int64_t c) {
        Each& e = *static_cast<Each*>(arg);
        variant().centroid(e.plan.job, e.plan.cluster(size_t(c)), e.out, workspace());
        trim(workspace());
      },
      &each);
}

void scale(const void* saved, Storage saved_storage, double grad, void* out, Storage out_storage,
           int64_t count, const Pool& pool) {
  static constexpr int64_t kBlock = 1 << 15;
  struct Each {
    const char* saved;
    char* out;
    Storage saved_storage, out_storage;
    double grad;
    int64_t count;
  } each{static_cast<const char*>(saved), static_cast<char*>(out), saved_storage, out_storage, grad, count};
  const auto block = [](void* arg, int64_t b) {
    const Each& e = *static_cast<Each*>(arg);
    variant().scale(e.saved + b * kBlock * bytes_of(e.saved_storage), e.saved_storage, e.grad,
                    e.out + b * kBlock * bytes_of(e.out_storage), e.out_storage,
                    std::min(kBlock, e.count - b * kBlock));
  };
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  if (blocks < 2)
    for (int64_t b = 0; b < blocks; ++b) block(&each, b);
  else
    pool.run(blocks, block, &each);
}

const Variant& variant() {
  static const Variant& chosen = []() -> const Variant& {
    std::vector<const Variant*> all;
#if defined(__x86_64__)
    all = {&kAvx512, &kAvx2};
#endif
    all.push_back(&kBaseline);
    const char* name = std::getenv("CMIM_KERNELS_CPU_VARIANT");
    if (name && *name) {
      std::string names;
      for (const Variant* v : all) {
        names += std::string(names.empty() ? "" : ", ") + v->name;
        if (std::strcmp(v->name, name) != 0) continue;
        if (v->supported()) return *v;
        throw std::runtime_error(std::string("CMIM_KERNELS_CPU_VARIANT: this processor cannot run '") + name +
                                 "'");
      }
      throw std::runtime_error(std::string("CMIM_KERNELS_CPU_VARIANT: expected one of ") + names + ", got '" +
                               name + "'");
    }
    for (const Variant* v : all)
      if (v->supported()) return *v;
    return kBaseline;
  }();
  return chosen;
}

}  // namespace cmim::cpu
