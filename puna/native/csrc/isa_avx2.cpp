#include "kernels_impl.h"

const Kernels* avx2_kernels() { return &TABLE; }
