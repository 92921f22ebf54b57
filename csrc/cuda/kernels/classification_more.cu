// Launchers of the other row losses. Two files, since nvcc takes minutes for each: they are compiled in
// parallel.
#include "classification.cuh"

namespace fastloss::cuda {

void softmax_focal_loss(const RowArgs& a, void* stream) {
  run_rows<Focal>(a, static_cast<cudaStream_t>(stream));
}
void token_stats(const RowArgs& a, void* stream) {
  run_rows<TokenStats>(a, static_cast<cudaStream_t>(stream));
}
void cross_entropy_numbers(const RowArgs& a, void* stream) {
  run_rows<CrossEntropyNumbers>(a, static_cast<cudaStream_t>(stream));
}

}  // namespace fastloss::cuda
