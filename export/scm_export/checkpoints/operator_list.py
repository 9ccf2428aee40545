"""Allowlist of the operators that an untrusted ``.pt2`` file may use: names in ``torch.ops.aten``, with the overload unless it is "default".

It is a list and not a rule because some torch operators write files and some crash the process on unusual arguments. Every operator here has a translation
to ONNX or decomposes into operators that have one. Random operators are left out, since a bundle draws its noise itself; so are operators on sparse and
nested tensors, and gradients.
"""

ACTIVATIONS = "celu elu gelu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu sigmoid silu tanh"
ARITHMETIC = "add.Scalar add.Tensor clamp clamp_max clamp_min div.Scalar div.Tensor exp mul.Scalar mul.Tensor neg sqrt sub.Scalar sub.Tensor"
ELEMENTWISE = """
    abs acos acosh addcdiv addcmul __and__.Scalar __and__.Tensor angle asin asinh atan atan2 atanh bitwise_and.Scalar bitwise_and.Tensor bitwise_not
    bitwise_or.Scalar bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Tensor ceil clamp.Tensor clamp_max.Tensor clamp_min.Tensor clip cos cosh deg2rad
    div.Scalar_mode div.Tensor_mode divide.Scalar divide.Tensor eq.Scalar eq.Tensor erf erfc exp2 expm1 fix float_power.Tensor_Scalar floor floor_divide
    fmod.Scalar fmod.Tensor frac ge.Scalar ge.Tensor glu greater.Scalar greater.Tensor greater_equal.Scalar greater_equal.Tensor gt.Scalar gt.Tensor
    hardshrink heaviside hypot isclose isfinite isinf isnan ldexp.Tensor le.Scalar le.Tensor lerp.Scalar lerp.Tensor less.Scalar less.Tensor
    less_equal.Scalar less_equal.Tensor log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit
    __lshift__.Scalar lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor maximum minimum multiply.Scalar multiply.Tensor nan_to_num ne.Scalar
    ne.Tensor not_equal.Scalar not_equal.Tensor __or__.Scalar __or__.Tensor positive pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu _prelu_kernel
    rad2deg reciprocal remainder.Scalar remainder.Tensor round round.decimals __rshift__.Scalar rsqrt rsub.Scalar rsub.Tensor sgn sign sin sinc sinh
    softplus softshrink special_expit square subtract.Scalar subtract.Tensor tan threshold true_divide.Scalar true_divide.Tensor trunc where.Scalar
    where.ScalarOther where.ScalarSelf where.self xlogy.Tensor __xor__.Scalar __xor__.Tensor
"""
REDUCTIONS = """
    all all.dim all.dims amax amin any any.dim any.dims argmax argmin argsort cdist count_nonzero cumprod cumsum linalg_norm linalg_vector_norm logcumsumexp
    logsumexp max max.dim max.other mean mean.dim min min.dim min.other nansum norm.Scalar norm.ScalarOpt_dim prod prod.dim_int renorm sort std
    std.correction std.dim std_mean.correction std_mean.dim sum sum.dim_IntList topk trace var var.correction var.dim var_mean.correction var_mean.dim
"""
PRODUCTS = """
    addbmm addmm addmv addr baddbmm bilinear bmm conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution cross dot einsum inner kron linalg_cross linear _log_softmax log_softmax.int matmul mm mv outer
    scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _softmax softmax.int special_log_softmax special_softmax tensordot vdot
"""
NORMS_AND_POOLING = """
    adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d alpha_dropout avg_pool1d avg_pool2d avg_pool3d
    batch_norm cosine_similarity dropout feature_alpha_dropout feature_dropout _fused_rms_norm group_norm instance_norm layer_norm max_pool1d max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices _native_batch_norm_legit_no_training native_group_norm native_layer_norm rms_norm
    _weight_norm
"""
RESAMPLING = """
    affine_grid_generator grid_sampler grid_sampler_2d pixel_shuffle pixel_unshuffle upsample_bicubic2d upsample_bicubic2d.vec upsample_bilinear2d
    upsample_bilinear2d.vec upsample_linear1d upsample_linear1d.vec upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec
    upsample_nearest3d upsample_nearest3d.vec upsample_trilinear3d upsample_trilinear3d.vec _upsample_bicubic2d_aa _upsample_bicubic2d_aa.vec
    _upsample_bilinear2d_aa _upsample_bilinear2d_aa.vec _upsample_nearest_exact1d _upsample_nearest_exact1d.vec _upsample_nearest_exact2d
    _upsample_nearest_exact2d.vec
"""
COMPLEX = """
    fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn complex
    conj _conj imag polar real resolve_conj resolve_neg view_as_complex view_as_real
"""
VIEWS_AND_COPIES = """
    alias broadcast_to clone contiguous copy detach expand expand_as flatten.using_ints lift_fresh lift_fresh_copy mH mT moveaxis.int moveaxis.intlist
    movedim.int movedim.intlist numpy_T permute ravel reshape reshape_as squeeze squeeze.dim squeeze.dims swapaxes swapdims t to.device to.dtype
    to.dtype_layout to.other _to_copy transpose.int type_as unflatten.int _unsafe_view unsqueeze view view_as
"""
INDEXING_AND_JOINING = """
    atleast_1d atleast_2d atleast_3d broadcast_tensors bucketize.Tensor cat channel_shuffle chunk col2im concat concatenate constant_pad_nd diag_embed
    diagonal diff dstack embedding flip fliplr flipud gather hstack im2col index.Tensor index_add index_copy index_fill.int_Scalar index_put index_select
    meshgrid meshgrid.indexing narrow one_hot pad reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave.self_int replication_pad1d
    replication_pad2d replication_pad3d roll rot90 scatter.src scatter.value scatter_add select.int select_scatter slice.Tensor slice_scatter split.Tensor
    split.sizes split_with_sizes stack take_along_dim tensor_split.indices tensor_split.sections tile tril triu unbind.int unfold _unsafe_index.Tensor
    unsafe_split.Tensor vstack
"""
CREATION = """
    arange arange.start arange.start_step empty.memory_format empty_like eye eye.m fill.Scalar fill.Tensor full full_like linspace new_empty new_full
    new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like
"""
SIZES = """
    sym_numel sym_size.int
"""

# In-place operators, which torch.export keeps: activations, sums, and assignments to parts of a tensor.
ASSIGNMENTS = "abs_ addcdiv_ addcmul_ copy_ detach_ fill_.Scalar fill_.Tensor index_put_ masked_fill_.Scalar masked_fill_.Tensor pow_.Scalar pow_.Tensor"
ASSIGNMENTS += " scatter_.src scatter_.value scatter_add_ squeeze_.dim unsqueeze_ zero_"


def _in_place(names: str) -> list[str]:
    """Names of the in-place variants: ``add_.Tensor`` for ``add.Tensor``."""
    return [f"{name}_{dot}{overload}" for name, dot, overload in (entry.partition(".") for entry in names.split())]


OPERATORS = frozenset(
    f"{ACTIVATIONS} {ARITHMETIC} {ELEMENTWISE} {REDUCTIONS} {PRODUCTS} {NORMS_AND_POOLING} {RESAMPLING} {COMPLEX} {VIEWS_AND_COPIES}"
    f" {INDEXING_AND_JOINING} {CREATION} {SIZES} {ASSIGNMENTS}".split()
    + _in_place(f"{ACTIVATIONS} {ARITHMETIC}")
)
