#include "classification_launch.cuh"

template struct fastloss::cuda::RowLaunchers<__half>;
