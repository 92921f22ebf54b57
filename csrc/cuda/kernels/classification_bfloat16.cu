#include "classification_launch.cuh"

template struct fastloss::cuda::RowLaunchers<__nv_bfloat16>;
