#include "kernels_impl.h"

const Kernels* avx512_kernels() { return &TABLE; }
