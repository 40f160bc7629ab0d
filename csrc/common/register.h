// FO_IMPL(CPU, "nf4_dequant", &function): the only way a kernel reaches the dispatcher. The op's schema is written in
// Python. The namespace is a macro so that a build under another name (Hugging Face kernels) needs no source change.
#pragma once

#include <torch/csrc/stable/library.h>

#if !defined(FASTOPS_NAMESPACE)
#define FASTOPS_NAMESPACE fastops
#endif

#define FO_IMPL_EXPANDED(ns, key, op, fn) \
  STABLE_TORCH_LIBRARY_IMPL(ns, key, m) { m.impl(op, TORCH_BOX(fn)); }
#define FO_IMPL_IN(ns, key, op, fn) FO_IMPL_EXPANDED(ns, key, op, fn)
#define FO_IMPL(key, op, fn) FO_IMPL_IN(FASTOPS_NAMESPACE, key, op, fn)
