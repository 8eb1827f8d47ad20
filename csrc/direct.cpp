// What a training step calls from Python: the loss and the gradient of plain CPU tensors, past the dispatcher
// and its boxed arguments, which take longer than the kernel where logits are few. backends/cpu.py says when;
// the operator is there for everything else. Python's limited API and the table by which torch.Tensor gives
// its tensors away (DLPack's) make this one binary for every Python and every torch, as the stable ABI does.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
// Compiled without TORCH_TARGET_VERSION, beside which torch refuses this header
#include <ATen/dlpack.h>

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "cpu/loss.h"
#include "pool.h"

namespace {

using cmim::cpu::Reduction;
using cmim::cpu::Request;
using cmim::cpu::Storage;

const DLPackExchangeAPI* exchange = nullptr;  // what bind() was given

std::optional<Storage> storage_of(DLDataType type) {
  if (type.code == kDLBfloat && type.bits == 16) return Storage::bf16;
  if (type.code == kDLFloat && type.bits == 16) return Storage::f16;
  if (type.code == kDLFloat && type.bits == 32) return Storage::f32;
  if (type.code == kDLFloat && type.bits == 64) return Storage::f64;
  return std::nullopt;
}

// Whether it is a tensor of so many dimensions with its elements in the CPU's memory.
bool read(PyObject* tensor, int dimensions, DLTensor& to) {
  if (exchange->dltensor_from_py_object_no_sync(tensor, &to) != 0) {
    PyErr_Clear();
    return false;
  }
  return to.device.device_type == kDLCPU && to.ndim == dimensions && to.data && to.byte_offset == 0;
}

// Or an exception is set.
std::vector<double> read(PyObject* tuple) {
  std::vector<double> values(size_t(PyTuple_Size(tuple)));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = PyFloat_AsDouble(PyTuple_GetItem(tuple, Py_ssize_t(i)));
  return values;
}

// loss(logits (N, C), target (N,), value (), saved (N, C), inverse_temperatures, temperature_weights,
//      ce_weight, cmi_weight, label_smoothing, ignore_index, reduction) -> bool
// as the operator, with save and without tables; value and saved are what it returns, written to. False, with
// nothing written, where the tensors are not such as can be read and written through, or numbers no tuples.
PyObject* loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 11 || !exchange) {
    PyErr_SetString(PyExc_TypeError, "loss: expected 11 arguments, and bind() to be called before");
    return nullptr;
  }
  DLTensor logits, target, value, saved;
  if (!read(args[0], 2, logits) || !read(args[1], 1, target) || !read(args[2], 0, value) ||
      !read(args[3], 2, saved) || !PyTuple_Check(args[4]) || !PyTuple_Check(args[5]))
    return PyBool_FromLong(false);
  Request q;
  q.rows = logits.shape[0], q.classes = logits.shape[1];
  const auto storage = storage_of(logits.dtype), kept = storage_of(saved.dtype),
             type = storage_of(value.dtype);
  if (!storage || !kept || target.dtype.code != kDLInt || target.dtype.bits != 64 ||
      target.shape[0] != q.rows || saved.shape[0] != q.rows || saved.shape[1] != q.classes ||
      type != (storage == Storage::f64 ? Storage::f64 : Storage::f32))
    return PyBool_FromLong(false);
  q.logits = logits.data, q.storage = *storage;
  q.row_stride = logits.strides[0], q.col_stride = logits.strides[1];
  q.target = static_cast<const int64_t*>(target.data), q.target_stride = target.strides[0];
  q.a = read(args[4]), q.w = read(args[5]);
  if (q.a.empty() || q.a.size() != q.w.size())
    PyErr_SetString(PyExc_ValueError, "loss: expected as many temperature_weights as inverse_temperatures");
  q.ce_weight = PyFloat_AsDouble(args[6]), q.cmi_weight = PyFloat_AsDouble(args[7]);
  q.label_smoothing = PyFloat_AsDouble(args[8]);
  q.ignore_index = PyLong_AsLongLong(args[9]);
  q.reduction = Reduction(PyLong_AsLongLong(args[10]));
  if (!PyErr_Occurred() && q.reduction != Reduction::mean && q.reduction != Reduction::sum)
    PyErr_SetString(PyExc_ValueError, "loss: expected reduction mean or sum");
  if (PyErr_Occurred()) return nullptr;

  std::vector<double> values;
  std::optional<std::string> failure;
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    cmim::cpu::forward(q, cmim::torch_pool(), values, saved.data, *kept);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  PyEval_RestoreThread(thread);
  if (failure) {
    PyErr_SetString(PyExc_RuntimeError, failure->c_str());
    return nullptr;
  }
  if (type == Storage::f64)
    *static_cast<double*>(value.data) = values[0];
  else
    *static_cast<float*>(value.data) = float(values[0]);
  return PyBool_FromLong(true);
}

// bind(torch.Tensor.__dlpack_c_exchange_api__)
PyObject* bind(PyObject*, PyObject* capsule) {
  const auto* table =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!table) return nullptr;
  if (table->header.version.major != DLPACK_MAJOR_VERSION || !table->dltensor_from_py_object_no_sync) {
    PyErr_SetString(PyExc_ImportError, "torch gives its tensors in another way than was known");
    return nullptr;
  }
  exchange = table;
  return PyBool_FromLong(true);
}

PyMethodDef methods[] = {
    {"loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(loss)), METH_FASTCALL, nullptr},
    {"bind", bind, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  return PyModule_Create(&definition);
}
