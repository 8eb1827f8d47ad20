// The operators of csrc/ops.cpp for CUDA tensors, on PyTorch's stable ABI. What is valid is decided in
// cmim_kernels/validate.py; here only what memory safety needs is checked again.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "launch.h"

#if defined(CMIM_EMULATED)  // the host tests register the same functions under another name, for CPU tensors
  #define CMIM_LIBRARY cmim_emulated
  #define CMIM_DISPATCH_KEY CPU
#else
  #define CMIM_LIBRARY cmim_kernels
  #define CMIM_DISPATCH_KEY CUDA
#endif

namespace {

using cmim::cuda::Call;
using cmim::cuda::Reduction;
using cmim::cuda::Storage;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Doubles = std::vector<double>;

// Makes the tensor's device the current one as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(t.get_device_index(), &guard_));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaStream_t stream() const { return stream_; }

 private:
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

Storage storage_of(const Tensor& t) {
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
      STD_TORCH_CHECK(false, "logits: expected float32, float64, bfloat16 or float16");
  }
}

ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

bool same_device(const Tensor& x, const Tensor& y) {
  return x.is_cpu() == y.is_cpu() && x.get_device_index() == y.get_device_index();
}

const void* table(const std::optional<Tensor>& t, const Tensor& logits, int64_t count, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(same_device(*t, logits) && t->is_contiguous() && t->numel() == count &&
                      t->scalar_type() == compute_type(logits),
                  name, ": expected a contiguous tensor of ", count,
                  " elements in the compute type, on the device of logits");
  return t->const_data_ptr();
}

Call make_call(const Tensor& logits, const Tensor& target, const Doubles& a, const Doubles& w,
               const std::optional<Tensor>& class_weight, const std::optional<Tensor>& centroids,
               double ce_weight, double cmi_weight, double label_smoothing, int64_t ignore_index,
               int64_t reduction) {
  STD_TORCH_CHECK(logits.dim() == 2 && target.dim() == 1 && target.size(0) == logits.size(0),
                  "logits, target: expected (N, C) and (N,)");
  STD_TORCH_CHECK(same_device(logits, target), "target: expected on the device of logits");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target: expected int64");
  constexpr int64_t most = cmim::cuda::kMaxSize;
  STD_TORCH_CHECK(logits.size(0) <= most && logits.size(1) >= 1 && logits.size(1) <= most,
                  "logits: expected 1 <= C and N, C <= ", most);
  STD_TORCH_CHECK(a.size() == w.size() && !a.empty() && a.size() <= size_t(cmim::cuda::kMaxTemperatures),
                  "inverse_temperatures: expected 1 to ", cmim::cuda::kMaxTemperatures,
                  " of them, as many as temperature_weights, got ", a.size());
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 3, "reduction: expected 0, 1, 2 or 3, got ", reduction);
  Call c;
  c.logits = logits.const_data_ptr();
  c.storage = storage_of(logits);
  c.rows = logits.size(0), c.classes = logits.size(1);
  c.row_stride = logits.stride(0), c.col_stride = logits.stride(1);
  c.target = static_cast<const int64_t*>(target.const_data_ptr());
  c.target_stride = target.stride(0);
  c.a = a, c.weight = w;
  c.class_weight = table(class_weight, logits, c.classes, "class_weight");
  c.centroids = table(centroids, logits, int64_t(a.size()) * c.classes * c.classes, "centroids");
  c.ce_weight = ce_weight, c.cmi_weight = cmi_weight, c.smoothing = label_smoothing;
  c.ignore_index = ignore_index;
  c.reduction = Reduction(reduction);
  return c;
}

Tensor empty(const Tensor& like, std::vector<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, size, type);
}

// The targets sorted by PyTorch. Memory that is freed here is handed out again on the same stream only.
class Sorted {
 public:
  explicit Sorted(const Tensor& target) {
    std::array<StableIValue, 4> stack{
        torch::stable::detail::from(target), torch::stable::detail::from(std::optional<bool>(true)),
        torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    label_ = torch::stable::detail::to<Tensor>(stack[0]);
    row_ = torch::stable::detail::to<Tensor>(stack[1]);
  }
  cmim::cuda::SortedTargets pointers() const {
    return {static_cast<const int64_t*>(label_.const_data_ptr()),
            static_cast<const int64_t*>(row_.const_data_ptr())};
  }

 private:
  Tensor label_, row_;
};

std::tuple<Tensor, Tensor> loss(Tensor logits, Tensor target, Doubles a, Doubles w,
                                std::optional<Tensor> class_weight, std::optional<Tensor> centroids,
                                double ce_weight, double cmi_weight, double label_smoothing,
                                int64_t ignore_index, int64_t reduction, bool save) {
  const Call call = make_call(logits, target, a, w, class_weight, centroids, ce_weight, cmi_weight,
                              label_smoothing, ignore_index, reduction);
  cmim::cuda::check_labels();
  const ScalarType type = compute_type(logits);
  std::vector<int64_t> shape;
  if (call.reduction == cmim::cuda::kNone) shape = {call.rows};
  if (call.reduction == cmim::cuda::kSpectrum) shape = {int64_t(a.size())};
  Tensor value = empty(logits, shape, type);
  // the gradient, what it is computed from, or nothing
  const bool keep = save && cmim::cuda::can_keep_gradient(call);
  const int64_t statistics = save ? cmim::cuda::saved_elements(call.rows, int64_t(a.size())) : 0;
  Tensor saved = keep ? empty(logits, {call.rows, call.classes}, logits.scalar_type())
                      : empty(logits, {statistics}, type);
  if (call.rows == 0) {
    const bool of_none = call.reduction == cmim::cuda::kMean && (call.ce_weight != 0 || call.cmi_weight != 0);
    const bool nan = of_none || call.reduction == cmim::cuda::kSpectrum;
    return {torch::stable::fill_(value, nan ? std::numeric_limits<double>::quiet_NaN() : 0.0), saved};
  }
  const OnDevice device(logits);
  Tensor scratch = empty(logits, {cmim::cuda::forward_scratch(call)}, type);
  std::optional<Sorted> sorted;
  if (cmim::cuda::wants_sorted_targets(call)) sorted.emplace(target);
  void* const kept = saved.mutable_data_ptr();
  cmim::cuda::forward(call, sorted ? sorted->pointers() : cmim::cuda::SortedTargets{},
                      value.mutable_data_ptr(), save && !keep ? kept : nullptr, keep ? kept : nullptr,
                      scratch.mutable_data_ptr(), device.stream());
  return {value, saved};
}

std::tuple<Tensor, Tensor> class_centroids(Tensor logits, Tensor target, Doubles a, int64_t ignore_index) {
  const Doubles w(a.size(), 1.0);
  const Call call = make_call(logits, target, a, w, std::nullopt, std::nullopt, 0, 1, 0, ignore_index,
                              cmim::cuda::kSpectrum);
  cmim::cuda::check_labels();
  const ScalarType type = compute_type(logits);
  Tensor centroids = torch::stable::new_zeros(logits, {int64_t(a.size()), call.classes, call.classes}, type);
  Tensor counts = torch::stable::new_zeros(target, {call.classes});
  if (call.rows == 0) return {centroids, counts};
  const OnDevice device(logits);
  Tensor scratch = empty(logits, {cmim::cuda::centroids_scratch(call)}, type);
  const Sorted sorted(target);
  cmim::cuda::class_centroids(call, sorted.pointers(), centroids.mutable_data_ptr(),
                              static_cast<int64_t*>(counts.mutable_data_ptr()), scratch.mutable_data_ptr(),
                              device.stream());
  return {centroids, counts};
}

Tensor loss_backward(Tensor grad, Tensor saved, Tensor logits, Tensor target, Doubles a, Doubles w,
                     std::optional<Tensor> class_weight, std::optional<Tensor> centroids, double ce_weight,
                     double cmi_weight, double label_smoothing, int64_t ignore_index, int64_t reduction) {
  const Call call = make_call(logits, target, a, w, class_weight, centroids, ce_weight, cmi_weight,
                              label_smoothing, ignore_index, reduction);
  const ScalarType type = compute_type(logits);
  const int64_t expected = call.reduction == cmim::cuda::kNone       ? call.rows
                           : call.reduction == cmim::cuda::kSpectrum ? int64_t(a.size())
                                                                     : 1;
  STD_TORCH_CHECK(same_device(grad, logits) && grad.scalar_type() == type && grad.numel() == expected,
                  "grad: expected ", expected, " elements in the compute type, on the device of logits");
  const bool keeps = cmim::cuda::can_keep_gradient(call), given_away = keeps && saved.numel() == 0;
  const int64_t elements =
      keeps ? call.rows * call.classes : cmim::cuda::saved_elements(call.rows, int64_t(a.size()));
  STD_TORCH_CHECK(given_away || (saved.is_contiguous() && same_device(saved, logits) &&
                                 saved.scalar_type() == (keeps ? logits.scalar_type() : type) &&
                                 saved.numel() == elements),
                  "saved: expected what the forward operator returned");
  Tensor out = empty(logits, {call.rows, call.classes}, logits.scalar_type());
  if (call.rows == 0) return out;
  const OnDevice device(logits);
  if (keeps) {
    Tensor scratch = empty(logits, {cmim::cuda::kept_scratch(call)}, type);
    cmim::cuda::backward_of_kept(call, grad.const_data_ptr(), given_away ? nullptr : saved.const_data_ptr(),
                                 out.mutable_data_ptr(), scratch.mutable_data_ptr(), device.stream());
    return out;
  }
  Tensor scratch = empty(logits, {cmim::cuda::backward_scratch(call)}, type);
  cmim::cuda::backward(call, grad.const_data_ptr(), grad.dim() == 1 ? grad.stride(0) : 0,
                       saved.mutable_data_ptr(), out.mutable_data_ptr(), scratch.mutable_data_ptr(),
                       device.stream());
  return out;
}

void check_cuda_labels() {
  cmim::cuda::check_labels();
}

// 0: by size, 1: one kernel, 2: the kernels for large problems
void set_cuda_path(int64_t path) {
  STD_TORCH_CHECK(path >= 0 && path <= 2, "path: expected 0, 1 or 2, got ", path);
  cmim::cuda::set_path(cmim::cuda::Path(path));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CMIM_LIBRARY, CMIM_DISPATCH_KEY, m) {
  m.impl("loss", TORCH_BOX(&loss));
  m.impl("loss_backward", TORCH_BOX(&loss_backward));
  m.impl("class_centroids", TORCH_BOX(&class_centroids));
}

STABLE_TORCH_LIBRARY_FRAGMENT(CMIM_LIBRARY, m) {
  m.def("check_cuda_labels() -> ()");
  m.def("set_cuda_path(int path) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(CMIM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("check_cuda_labels", TORCH_BOX(&check_cuda_labels));
  m.impl("set_cuda_path", TORCH_BOX(&set_cuda_path));
}
