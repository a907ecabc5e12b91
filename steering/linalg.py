"""Linear algebra of the methods. Pure functions on tensors; no state, no models.

Shapes: D hidden size, K dimensions of a subspace. Everything is meant for float64: the methods
subtract large numbers from each other, and float32 would leave too little of the difference.

Class directions (support vector machines, differences of means) are in `steering.directions`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part `(M + M^T) / 2` `[D, D]`: what rounding has left of a symmetric matrix."""
    return (matrix + matrix.mT) / 2


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and eigenvectors as columns, of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(symmetric(matrix))
    return values, vectors


def psd_root(matrix: Tensor) -> Tensor:
    """`M^(1/2)` `[D, D]`, the positive semi-definite root of a positive semi-definite `M` `[D, D]`.

    Through the eigendecomposition; eigenvalues that rounding made negative count as 0.
    """
    values, vectors = _eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.mT


def psd_inverse_root(matrix: Tensor) -> Tensor:
    """`M^(-1/2)` `[D, D]` of a positive definite `M` `[D, D]`.

    Raises ValueError if `M` is singular to working precision; add a ridge to it then.
    """
    values, vectors = _eigh(matrix)
    smallest, largest = float(values[0]), float(values[-1])
    if not smallest > len(values) * torch.finfo(values.dtype).eps * largest:
        raise ValueError(
            f"a covariance is singular (eigenvalues {smallest:.3g} to {largest:.3g}); give more "
            "distinct prompts, fewer components or a larger ridge"
        )
    return vectors * values.rsqrt() @ vectors.mT


def psd_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`M^(1/2)` and its pseudo-inverse, `[D, D]` both, of a positive semi-definite `M` `[D, D]`.

    Directions in which `M` is 0 to working precision are 0 in both.
    """
    values, vectors = _eigh(matrix)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT


def gaussian_map(source: Tensor, target: Tensor) -> Tensor:
    """Linear part `A` `[K, K]` of the optimal transport map between two Gaussians.

        A = S_s^(-1/2) (S_s^(1/2) S_t S_s^(1/2))^(1/2) S_s^(-1/2)

    The only positive definite solution of `A S_s A = S_t`; with the means, `x -> m_t + A (x - m_s)`
    is the map of least expected squared distance (Bures-Wasserstein; Peyre and Cuturi,
    "Computational Optimal Transport", remark 2.31; arXiv 2603.04355).

    Args:
        source, target: `S_s`, `S_t`, covariances `[K, K]`, the first one positive definite.
    """
    root, inverse_root = psd_root(source), psd_inverse_root(source)
    return symmetric(inverse_root @ psd_root(root @ target @ root) @ inverse_root)


def shrink(covariance: Tensor, shrinkage: float) -> Tensor:
    """`(1 - g) S + g (trace(S) / K) I`: towards a sphere of the same total variance.

    Args:
        covariance: `S` `[K, K]`.
        shrinkage: `g`, in [0, 1] (Ledoit and Wolf's form with a fixed weight).
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage is a share from 0 to 1, got {shrinkage:g}")
    size = covariance.shape[0]
    sphere = torch.eye(size, dtype=covariance.dtype) * covariance.trace() / size
    return (1 - shrinkage) * covariance + shrinkage * sphere


def principal_components(covariance: Tensor, count: int) -> Tensor:
    """`P` `[D, count]`: orthonormal eigenvectors of the largest eigenvalues, largest first.

    Each is signed so that its largest entry is positive, which `eigh` leaves open.
    """
    size = covariance.shape[0]
    if not 1 <= count <= size:
        raise ValueError(f"between 1 and {size} components, got {count}")
    vectors = _eigh(covariance)[1][:, -count:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def null_space(second_moment: Tensor, rho: float) -> Tensor:
    """`Q` `[D, K]`: the `K = floor(rho D)` directions in which the data have least energy.

    Eigenvectors of the smallest eigenvalues of `C = sum h h^T`, uncentred: `P = Q Q^T` is
    AlphaSteer's null-space projector (arXiv 2506.07022, "utility preservation").

    Args:
        second_moment: `C` `[D, D]`.
        rho: a fixed ratio, 0.3 to 0.6 in the released settings.
    """
    size = second_moment.shape[0]
    count = null_space_size(size, rho)
    if not 0 < rho <= 1 or count < 1:
        raise ValueError(f"rho = {rho:g} keeps no direction of {size}; it is a share above 0, to 1")
    return _eigh(second_moment)[1][:, :count]


def null_space_size(size: int, rho: float) -> int:
    """`K = floor(rho D)`."""
    # 0.3 * 10 is 2.9999999999999996: a count just below a whole number is that number.
    return int(rho * size + 1e-9)


def null_space_ridge(basis: Tensor, second_moment: Tensor, total: Tensor, penalty: float) -> Tensor:
    """`w = Q (Q^T S Q + a I)^{-1} Q^T m` `[D]`: the ridge gate in the span of `Q`.

    Minimises `sum_i (w . h_i - 1)^2 + a ||w||^2` over `w` in that span, with `S = sum h h^T` and
    `m = sum h`. With every target column equal to `r`, AlphaSteer's closed form for `D = D~ P`
    (arXiv 2506.07022, "safety enhancement") is exactly `r w^T`.

    Args:
        basis: `Q` `[D, K]`, orthonormal columns.
        second_moment: `S` `[D, D]`.
        total: `m` `[D]`.
        penalty: `a`, above 0.
    """
    if not penalty > 0:
        raise ValueError(f"the ridge penalty must be above 0, got {penalty:g}")
    inner = symmetric(basis.mT @ second_moment @ basis)
    inner = inner + penalty * torch.eye(len(inner), dtype=inner.dtype)
    factor = torch.linalg.cholesky(inner)
    return basis @ torch.cholesky_solve((basis.mT @ total)[:, None], factor)[:, 0]
