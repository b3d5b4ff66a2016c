// The kernels of a layer but attention. Defined by who includes it: run<MODE, K>(Args, weights, input); MOST_REGISTERS: of a thread of those
// that attention is not beside.
#pragma once
#include "wide.cuh"

#define KERNEL(name, registers) extern "C" __global__ __cluster_dims__(CLUSTER_##name, 1, 1) __maxnreg__(registers) void name

KERNEL(qkv, REGISTERS_BESIDE)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, const float* sums, int is_finished,
            const float* cos, const float* sin, const int* positions, const int* slots, u16* q, u16* keys, u16* values, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.is_finished = is_finished; p.sums = sums; p.cos = cos; p.sin = sin; p.positions = positions;
  p.slots = slots; p.q = q; p.keys = keys; p.values = values;
  run<QKV, HIDDEN>(p, w, x);
}

KERNEL(out, REGISTERS_BESIDE)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, float* h, const float* gamma,
            u16* next, float* new_sums, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums;
  run<OUT, Q_SIZE>(p, w, x);
}

KERNEL(gate_up, MOST_REGISTERS)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, const float* sums,
                int is_finished, u16* y, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.is_finished = is_finished; p.sums = sums; p.y = y;
  run<GATE_UP, HIDDEN>(p, w, x);
}

KERNEL(down, MOST_REGISTERS)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, float* h, const float* gamma,
             u16* next, float* new_sums, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums;
  run<DOWN, FFN>(p, w, x);
}
