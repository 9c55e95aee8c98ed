"""How the `heal::` operators run fast: Inductor lowerings. May import `arithmetic` and `ops`.

Installed as `healpass.lowering`. `register()` gives Inductor one lowering per operator; it looks
at the device and hands on to `cpu` (C++ code), to `cuda` (Triton templates), or to `quantize`
(pointwise code on either). An operator without a lowering for its device runs its reference
implementation, as one call from the code. Exact precisions are decompositions instead:
bit-reproducible operators are traced as they are, and matrix products and attention are decomposed
by `cpu.exact`, or by `cuda.exact_matmul` and `cuda.exact_attention`. Where the compile says that
operators stay whole, AOTAutograd decomposes none, and the backend does later. Operators that
engines call between graphs have kernels that stand in for them (`cpu.paged`, `cuda.paged`).
