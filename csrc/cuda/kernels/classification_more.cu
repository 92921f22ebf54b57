// Launchers of the other row losses. They have a file of their own, since nvcc takes minutes for either: two
// files are compiled at the same time.
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
