// The operators' schemas and their CPU implementation, on PyTorch's stable ABI: one binary for every later
// torch and every Python. What is valid is decided in cmim_kernels/validate.py; here only what memory
// safety needs is checked again, since the operators can be called by themselves.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/loss.h"
#include "pool.h"

namespace {

using cmim::torch_pool;
using cmim::cpu::Reduction;
using cmim::cpu::Request;
using cmim::cpu::Storage;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Doubles = std::vector<double>;

void run_on_pool(int64_t count, void (*fn)(void*, int64_t), void* arg) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(arg, i);
  });
}

Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::f32;
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

ScalarType saved_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : compute_type(logits);
}

const void* table(const std::optional<Tensor>& t, const Tensor& logits, int64_t count, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(
      t->is_cpu() && t->is_contiguous() && t->numel() == count && t->scalar_type() == compute_type(logits),
      name, ": expected a contiguous CPU tensor of ", count, " elements in the compute type");
  return t->const_data_ptr();
}

Request request(const Tensor& logits, const Tensor& target, const Doubles& a, const Doubles& w,
                const std::optional<Tensor>& class_weight, const std::optional<Tensor>& centroids,
                double ce_weight, double cmi_weight, double label_smoothing, int64_t ignore_index,
                int64_t reduction) {
  STD_TORCH_CHECK(logits.dim() == 2 && target.dim() == 1 && target.size(0) == logits.size(0),
                  "logits, target: expected (N, C) and (N,)");
  STD_TORCH_CHECK(logits.is_cpu() && target.is_cpu(), "logits, target: expected CPU tensors");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target: expected int64");
  STD_TORCH_CHECK(!a.empty() && a.size() == w.size(),
                  "inverse_temperatures: expected as many as temperature_weights");
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 3, "reduction: expected 0, 1, 2 or 3, got ", reduction);
  Request q;
  q.logits = logits.const_data_ptr();
  q.storage = storage_of(logits, "logits");
  q.rows = logits.size(0), q.classes = logits.size(1);
  q.row_stride = logits.stride(0), q.col_stride = logits.stride(1);
  q.target = static_cast<const int64_t*>(target.const_data_ptr());
  q.target_stride = target.stride(0);
  q.a = a, q.w = w;
  q.class_weight = table(class_weight, logits, q.classes, "class_weight");
  q.centroids = table(centroids, logits, int64_t(a.size()) * q.classes * q.classes, "centroids");
  q.ce_weight = ce_weight, q.cmi_weight = cmi_weight, q.label_smoothing = label_smoothing;
  q.ignore_index = ignore_index;
  q.reduction = Reduction(reduction);
  return q;
}

void store(const Doubles& values, const Tensor& to) {
  void* p = to.mutable_data_ptr();
  for (size_t i = 0; i < values.size(); ++i) {
    if (to.scalar_type() == ScalarType::Double)
      static_cast<double*>(p)[i] = values[i];
    else
      static_cast<float*>(p)[i] = float(values[i]);
  }
}

Doubles values_of(const Tensor& t) {
  const Tensor flat = torch::stable::contiguous(t);
  Doubles values(size_t(t.numel()));
  const void* p = flat.const_data_ptr();
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = t.scalar_type() == ScalarType::Double ? static_cast<const double*>(p)[i]
                                                      : double(static_cast<const float*>(p)[i]);
  return values;
}

// Whether a multiplication by it does not round, but for what becomes subnormal
bool scales_exactly(double upstream) {
  int exponent;
  return std::fabs(std::frexp(upstream, &exponent)) == 0.5;
}

int32_t dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

// A contiguous CPU tensor of (rows, cols), of (rows) or of (). Straight from the allocator: new_empty takes
// its way through the dispatcher, twice as long.
Tensor empty(std::initializer_list<int64_t> size, ScalarType type) {
  const int64_t strides[] = {size.size() == 2 ? size.begin()[1] : 1, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.begin(), strides, dtype_of(type),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// saved is the gradient for an upstream gradient of one: while a cluster's exponentials are at hand its
// gradient costs little more, and backward is left with one multiplication. It is in the compute type, so
// that the one rounding comes last; for bfloat16, whose exponents are those of float, in bfloat16, since a
// multiplication by a power of two does not round, and any other is done from the start.
std::tuple<Tensor, Tensor> loss(Tensor logits, Tensor target, Doubles a, Doubles w,
                                std::optional<Tensor> class_weight, std::optional<Tensor> centroids,
                                double ce_weight, double cmi_weight, double label_smoothing,
                                int64_t ignore_index, int64_t reduction, bool save) {
  const Request q = request(logits, target, a, w, class_weight, centroids, ce_weight, cmi_weight,
                            label_smoothing, ignore_index, reduction);
  const bool scalar = q.reduction == Reduction::mean || q.reduction == Reduction::sum;
  const ScalarType type = compute_type(logits), kept = saved_type(logits);
  Tensor saved = save && scalar ? empty({q.rows, q.classes}, kept) : empty({0}, kept);
  Doubles values;
  cmim::cpu::forward(q, torch_pool(), values, save && scalar ? saved.mutable_data_ptr() : nullptr,
                     storage_of(saved, "saved"));
  Tensor value = scalar ? empty({}, type) : empty({int64_t(values.size())}, type);
  store(values, value);
  return {value, saved};
}

Tensor loss_backward(Tensor grad, Tensor saved, Tensor logits, Tensor target, Doubles a, Doubles w,
                     std::optional<Tensor> class_weight, std::optional<Tensor> centroids, double ce_weight,
                     double cmi_weight, double label_smoothing, int64_t ignore_index, int64_t reduction) {
  const Request q = request(logits, target, a, w, class_weight, centroids, ce_weight, cmi_weight,
                            label_smoothing, ignore_index, reduction);
  const ScalarType type = compute_type(logits);
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == type,
                  "grad: expected a CPU tensor of the loss's dtype");
  const Doubles upstream = values_of(grad);
  const int64_t expected = q.reduction == Reduction::none       ? q.rows
                           : q.reduction == Reduction::spectrum ? int64_t(a.size())
                                                                : 1;
  STD_TORCH_CHECK(int64_t(upstream.size()) == expected, "grad: expected ", expected, " elements");
  Tensor out = empty({q.rows, q.classes}, logits.scalar_type());
  // Multiplied by an infinite number or NaN, rows that are ignored would not stay 0.
  if (expected == 1 && q.reduction != Reduction::none && q.reduction != Reduction::spectrum &&
      saved.numel() > 0 && std::isfinite(upstream[0]) &&
      (saved.scalar_type() == type || scales_exactly(upstream[0]))) {
    STD_TORCH_CHECK(
        saved.numel() == out.numel() && saved.is_contiguous() && saved.scalar_type() == saved_type(logits),
        "saved: expected what the forward operator returned");
    cmim::cpu::scale(saved.const_data_ptr(), storage_of(saved, "saved"), upstream[0], out.mutable_data_ptr(),
                     q.storage, out.numel(), torch_pool());
  } else {
    cmim::cpu::backward(q, torch_pool(), upstream, out.mutable_data_ptr(), q.storage);
  }
  return out;
}

std::tuple<Tensor, Tensor> class_centroids(Tensor logits, Tensor target, Doubles a, int64_t ignore_index) {
  const Doubles w(a.size(), 1.0);
  const Request q = request(logits, target, a, w, std::nullopt, std::nullopt, 0, 1, 0, ignore_index, 3);
  Tensor out = torch::stable::new_zeros(logits, std::vector<int64_t>{int64_t(a.size()), q.classes, q.classes},
                                        compute_type(logits));
  Tensor counts = torch::stable::new_zeros(logits, std::vector<int64_t>{q.classes}, ScalarType::Long);
  cmim::cpu::class_centroids(q, torch_pool(), out.mutable_data_ptr(),
                             static_cast<int64_t*>(counts.mutable_data_ptr()));
  return {out, counts};
}

}  // namespace

cmim::cpu::Pool cmim::torch_pool() {
  return {int(torch::stable::get_num_threads()), run_on_pool};
}

STABLE_TORCH_LIBRARY(cmim_kernels, m) {
  m.def(
      "loss(Tensor logits, Tensor target, float[] inverse_temperatures, float[] temperature_weights, "
      "Tensor? class_weight, Tensor? centroids, float ce_weight, float cmi_weight, float label_smoothing, "
      "int ignore_index, int reduction, bool save) -> (Tensor, Tensor)");
  m.def(
      "loss_backward(Tensor grad, Tensor saved, Tensor logits, Tensor target, float[] inverse_temperatures, "
      "float[] temperature_weights, Tensor? class_weight, Tensor? centroids, float ce_weight, float "
      "cmi_weight, "
      "float label_smoothing, int ignore_index, int reduction) -> Tensor");
  m.def(
      "class_centroids(Tensor logits, Tensor target, float[] inverse_temperatures, int ignore_index) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cmim_kernels, CPU, m) {
  m.impl("loss", TORCH_BOX(&loss));
  m.impl("loss_backward", TORCH_BOX(&loss_backward));
  m.impl("class_centroids", TORCH_BOX(&class_centroids));
}
