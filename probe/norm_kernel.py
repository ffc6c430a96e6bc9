"""The one Triton kernel of this project: gradients pulled back through an RMSNorm.

Query, key and value each need it in every layer. Plain torch reads and writes whole gradients half
a dozen times for that; here each is read and written once, for all three together. It is in a
module of its own because Triton must be there on import; `probe.kernels` calls it where it is.

    >>> pull_through_norm(gradients, value, weight, offset=0.0, eps=1e-5)
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def pull_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    gradients,  # noqa: ANN001 - pointers and numbers of Triton's own
    value,  # noqa: ANN001
    weight,  # noqa: ANN001
    branch_stride,  # noqa: ANN001
    width,  # noqa: ANN001
    offset,  # noqa: ANN001
    eps,  # noqa: ANN001
    BRANCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One position: r a - r^3 <a, x> x / d for each branch, summed in float32."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    here = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(value + here, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
    rate = 1 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    for branch in tl.static_range(BRANCHES):
        place = gradients + branch * branch_stride.to(tl.int64) + here
        along = tl.load(place, mask=inside, other=0.0).to(tl.float32) * gain
        radial = tl.sum(along * x, axis=0) * rate * rate / width
        result = rate * (along - radial * x)
        tl.store(place, result.to(gradients.dtype.element_ty), mask=inside)
