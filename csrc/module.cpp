// The module omnigrpo_kernels._C: op schemas, and which instruction set the CPU kernels use.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "head.h"

STABLE_TORCH_LIBRARY(omnigrpo, m) {
  m.def(
      "head_exps(Tensor hidden, Tensor weight, Tensor pair_rows, Tensor pair_targets, float temperature, bool store) "
      "-> (Tensor exps, Tensor offset, Tensor others, Tensor weighted, Tensor pair_logits)");
  m.def(
      "head_gradients(Tensor(a!) exps, Tensor hidden, Tensor weight, Tensor live, Tensor row_scale, Tensor? alpha, "
      "Tensor? beta, Tensor(b!)? grad_weight, bool accumulate, bool want_hidden) -> Tensor");
  m.def(
      "shared_prefix_attention_backward_amx(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "int[] prefix_lengths, int[] completion_counts, int[] completion_lengths, bool prefix_queries, float scale, "
      "int pieces) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("skinny_linear(Tensor rows, Tensor weight, Tensor? bias, bool wide) -> Tensor");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor groups, "
      "Tensor prefix_blocks, Tensor prefix_lengths, Tensor own_blocks, Tensor own_lengths, float scale) "
      "-> Tensor");
  m.def("draw_tokens(Tensor logits, Tensor uniform, float temperature) -> (Tensor token, Tensor logprob)");
  m.def("yuv420_to_rgb(Tensor y, Tensor u, Tensor v, Tensor(a!) rgb, int[] coefficients) -> ()");
}

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(omnigrpo::head_kernels().isa); }

PyObject* use_cpu_isa(PyObject*, PyObject* args) {
  const char* isa = nullptr;
  if (!PyArg_ParseTuple(args, "s", &isa)) return nullptr;
  if (!omnigrpo::use_isa(isa)) {
    return PyErr_Format(PyExc_ValueError, "use_cpu_isa: this build or this CPU has no '%s'; the active one is '%s'", isa,
                        omnigrpo::head_kernels().isa);
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Instruction set of the active CPU kernels: amx_bf16, avx512_bf16, avx512, avx2 or baseline."},
    {"use_cpu_isa", use_cpu_isa, METH_VARARGS, "Makes another instruction set active, for tests and benchmarks."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", "CPU kernels of omnigrpo.", -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module_definition); }
