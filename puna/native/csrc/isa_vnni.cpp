#include "kernels_impl.h"

const Kernels* vnni_kernels() { return &TABLE; }
