"""Triton kernels: portable from sm_80 on. Shapes of the model are constants of a kernel.

Read by Triton's compiler when an engine is built, and by its interpreter in tests; the runtime
only has their binaries. Names of constants: D hidden, H query heads, K KV heads, E head_dim, J = H
/ K query heads that share a KV head, P block size; EP, JP ... the next power of two; KP columns of
a stored matrix, XS, YS the distance of rows.
"""
