// Marks what the pybind11 module calls in the library of operators.
#pragma once
#define FASTLOSS_EXPORT __attribute__((visibility("default")))
