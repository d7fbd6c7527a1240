// The module omnigrpo_kernels._C: op schemas, and which instruction set the CPU kernels use.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "logit_rows.h"

STABLE_TORCH_LIBRARY(omnigrpo, m) {
  m.def(
      "logit_row_stats(Tensor logits, Tensor targets, float temperature) "
      "-> (Tensor logprob, Tensor entropy, Tensor lse)");
  m.def(
      "logit_row_grads_(Tensor(a!) logits, Tensor targets, Tensor logprob, Tensor entropy, Tensor lse, "
      "Tensor grad_logprob, Tensor grad_entropy, Tensor grad_lse, float temperature) -> ()");
}

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(omnigrpo::logit_row_kernels().isa); }

PyObject* use_cpu_isa(PyObject*, PyObject* args) {
  const char* isa = nullptr;
  if (!PyArg_ParseTuple(args, "s", &isa)) return nullptr;
  if (!omnigrpo::use_isa(isa)) {
    return PyErr_Format(PyExc_ValueError, "use_cpu_isa: this build or this CPU has no '%s'; the active one is '%s'", isa,
                        omnigrpo::logit_row_kernels().isa);
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Instruction set of the active CPU kernels: avx512, avx2 or baseline."},
    {"use_cpu_isa", use_cpu_isa, METH_VARARGS, "Makes another instruction set active, for tests and benchmarks."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", "CPU kernels of omnigrpo.", -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module_definition); }
