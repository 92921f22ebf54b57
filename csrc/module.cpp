// fastloss._C: what was built, what this machine has, the pool. Importing it also registers the operators.
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"
#include "cpu/pool.h"
#if defined(FASTLOSS_CUDA)
#include "cuda/attributes.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict d;
#if defined(FASTLOSS_CUDA)
  d["cuda"] = true;
  d["cuda_archs"] = FASTLOSS_CUDA_ARCHS;
  d["nvcc"] = FASTLOSS_NVCC;
#else
  d["cuda"] = false;
#endif
  d["cpu_capabilities"] = py::make_tuple("sse2", "avx2", "avx512");
  d["compiler"] = "g++ " __VERSION__;
  d["torch_target"] = "2.11";
  return d;
}

py::dict pool_statistics() {
  const fastloss::cpu::PoolStatistics s = fastloss::cpu::pool_statistics();
  py::dict d;
  d["in_use_bytes"] = s.in_use;
  d["cached_bytes"] = s.cached;
  d["peak_in_use_bytes"] = s.peak_in_use;
  d["limit_bytes"] = s.limit;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  return d;
}

py::list cuda_kernels() {
  py::list all;
#if defined(FASTLOSS_CUDA)
  for (const fastloss::cuda::KernelAttributes& k : fastloss::cuda::kernel_attributes()) {
    py::dict d;
    d["name"] = k.name;
    d["registers"] = k.registers;
    d["shared_bytes"] = k.shared_bytes;
    d["spill_bytes"] = k.local_bytes;
    all.append(d);
  }
#endif
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What was compiled, for which machines and by what.");
  m.def("linear_capability", &fastloss::cpu::linear_capability, "The same for matrix products.");
  m.def("cpu_capability", &fastloss::cpu::capability, "The instruction set whose kernels run here.");
  m.def("cuda_kernels", &cuda_kernels,
        "Registers, shared memory and spills of each CUDA kernel; empty without a GPU.");
  m.def("pool_statistics", &pool_statistics);
  m.def("pool_empty", &fastloss::cpu::pool_empty);
  m.def("pool_watch", &fastloss::cpu::pool_watch);
  m.def("pool_watched", &fastloss::cpu::pool_watched);
  m.def("pool_set_limit", &fastloss::cpu::pool_set_limit, py::arg("bytes"));
}
