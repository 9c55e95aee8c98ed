"""Which of torch's operators do what to a dtype: plain data for the passes. Imports nothing.

Names are those of `nodes.op_name`: one name for the function, the method and the ATen operator.
"""


def words(text: str) -> frozenset[str]:
    """A set of names written as one text."""
    return frozenset(text.split())


#: Products of matrices and vectors that become `heal::` operators.
MATMULS = words(
    """
    linear matmul __matmul__ __rmatmul__ linalg_matmul mm bmm mv dot vdot inner addmm addmv
    addbmm baddbmm addmm_ addmv_ addbmm_ baddbmm_ _grouped_mm grouped_mm
    """
)

#: Operators made of matmuls; they are opened first, then their parts are rewritten.
COMPOSITES = words(
    """
    einsum tensordot chain_matmul linalg_multi_dot bilinear multi_head_attention_forward
    _transformer_encoder_layer_fwd
    """
)

SDPA = frozenset({"scaled_dot_product_attention"})

#: Products of quantized operands: they run as traced, with the dtypes that they were traced with.
QUANTIZED = words(
    """
    _int_mm _scaled_mm scaled_mm _scaled_grouped_mm scaled_grouped_mm _weight_int8pack_mm
    _weight_int4pack_mm _weight_int4pack_mm_for_cpu _dyn_quant_matmul_4bit
    """
)

#: Other contractions. No `heal::` operator stands for them: they run as traced, in FP32 by
# promotion.
OTHER_CONTRACTIONS = {
    **dict.fromkeys(
        words(
            """
            conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
            _convolution
            """
        ),
        "no heal operator for convolutions; runs as torch's FP32 convolution",
    ),
    **dict.fromkeys(
        words(
            """
            lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
            """
        ),
        "recurrent cell: its matmuls are inside one torch operator; runs in FP32",
    ),
    **dict.fromkeys(
        words(
            """
            _native_multi_head_attention cdist matrix_power linalg_matrix_power linalg_inv
            inverse linalg_solve cholesky_solve linalg_lstsq trapezoid cov corrcoef
            """
        ),
        "its matmuls are inside one torch operator; runs in FP32",
    ),
    **dict.fromkeys(QUANTIZED, "quantized matmul: its format is the caller's choice"),
    "sparse_mm": "sparse matmul",
}

#: Move data without computing: the result has the dtype of the input, weights stay 16-bit.
MOVES = words(
    """
    view reshape view_as reshape_as transpose swapaxes swapdims permute movedim moveaxis t T mT
    numpy_T adjoint matrix_transpose expand expand_as unsqueeze squeeze contiguous clone
    flatten unflatten ravel chunk split tensor_split split_with_sizes unsafe_chunk unsafe_split
    narrow repeat tile repeat_interleave detach detach_ select index_select gather take
    take_along_dim unbind flip fliplr flipud roll rot90 getitem diagonal diag as_strided unfold
    broadcast_to broadcast_tensors atleast_1d atleast_2d atleast_3d cpu cuda alias slice
    unsafe_view _unsafe_view _reshape_alias lift_fresh_copy requires_grad_ pad pixel_shuffle
    meshgrid cat concat concatenate stack hstack vstack dstack column_stack hsplit vsplit
    dsplit getattr
    """
)

#: Moves with several tensor inputs, which must agree in dtype.
JOINS = words(
    """
    cat concat concatenate stack hstack vstack dstack column_stack broadcast_tensors meshgrid
    """
)

#: Moves that read an element more than once: their gradients are sums.
REPEATS = words(
    """
    expand expand_as repeat tile repeat_interleave broadcast_to broadcast_tensors index_select
    gather take take_along_dim getitem unfold as_strided
    """
)

#: Functional writes into a buffer: with a 16-bit cache as destination the result stays 16-bit.
BUFFER_WRITES = words(
    """
    cat concat concatenate index_copy index_put scatter slice_scatter select_scatter
    diagonal_scatter index_add masked_scatter
    """
)

#: Change the dtype and nothing else.
CASTS = words(
    """
    to type bfloat16 half float double type_as _to_copy convert_element_type
    """
)

#: Make tensors from nothing, or from a shape and an optional dtype.
FACTORIES = words(
    """
    zeros ones full empty arange tensor scalar_tensor zeros_like ones_like full_like empty_like
    rand randn rand_like randn_like linspace logspace eye new_zeros new_ones new_full new_empty
    new_tensor empty_strided new_empty_strided as_tensor asarray
    """
)

#: Make and open pairs of a value and its tangent; the two must keep one dtype.
DUALS = frozenset({"_make_dual", "make_dual", "_unpack_dual", "unpack_dual"})

#: Bookkeeping of functorch and autocast around the operators: never executed by a pass.
SCOPES = words(
    """
    _vmap_increment_nesting _vmap_decrement_nesting lazy_load_decompositions _enter_autocast
    _exit_autocast _set_grad_enabled _enter_inference_mode _exit_inference_mode
    _enter_dual_level _exit_dual_level _saved_tensors_hooks_disable _saved_tensors_hooks_enable
    """
)

#: In-place arithmetic of Python's operators.
IN_PLACE_OPERATORS = words(
    """
    iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift
    """
)

#: What draws random numbers.
RANDOM = words(
    """
    rand randn rand_like randn_like randint randint_like randperm bernoulli multinomial normal
    uniform_ normal_ exponential_ bernoulli_
    """
)
