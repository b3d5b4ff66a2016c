#include "kernels_impl.h"

const Kernels* portable_kernels() { return &TABLE; }
