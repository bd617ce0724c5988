"""Where synchronous elastic averaging is stable: the linear maps of a quadratic, solved for the step size."""

from typing import Literal

__all__ = ["Order", "stable_step_sizes"]

Order = Literal["jacobi", "gauss_seidel"]


def stable_step_sizes(
    num_replicas: int, moving_rate: float, center_rate: float, order: Order = "jacobi"
) -> tuple[float, float] | None:
    """Returns the open interval of e = eta h in which synchronous EASGD with period 1 is stable on a quadratic.

    h is a curvature. In Jacobi order the mean replica and the center move by ``[[1-e-alpha, alpha], [beta, 1-beta]]``,
    the replicas' differences by ``1 - e - alpha``; in Gauss-Seidel order by ``[[q, a], [beta q, 1-beta+beta a]]`` with
    ``q = (1-e)(1-alpha)``, ``a = (1-e) alpha``, the differences by q. The Jury conditions on the first and ``|.| < 1``
    on the second are linear in e. With ``beta = p alpha`` the upper end in Jacobi order solves
    ``alpha = 2 (2 - e) / (2 + p (2 - e))``.

    Args:
        num_replicas: p, >= 1.
        moving_rate: alpha, any sign.
        center_rate: beta.
        order: of the moves.

    Returns:
        ``(low, high)``, or None where no step size is stable.
    """
    a, b = moving_rate, center_rate
    if b < 0:
        return None  # an eigenvalue stays beyond 1
    # Each condition reads: slope * e < bound.
    if order == "jacobi":
        differences = [(1.0, 2 - a), (-1.0, a)]
        pair = [
            (2 - b, 4 - 2 * a - 2 * b),  # 1 + trace + det > 0
            (b - 1, a + b),  # det < 1
            (1 - b, 2 - a - b),  # det > -1
        ]
    else:
        differences = [(1 - a, 2 - a), (a - 1, a)]
        det, both = (1 - a) * (1 - b), 2 - 2 * a - b + 2 * a * b  # at e = 0: det, and trace + det - (1 - b)
        pair = [(both, both + 2 - b), (-det, 1 - det), (det, 1 + det)]
    # Where b is 0 the center stays where it is, and the mean moves like the differences.
    conditions = [(-1.0, 0.0), *(pair if b else []), *(differences if num_replicas > 1 or not b else [])]
    low, high = 0.0, float("inf")
    for slope, bound in conditions:
        if slope > 0:
            high = min(high, bound / slope)
        elif slope < 0:
            low = max(low, bound / slope)
        elif bound <= 0:
            return None
    return (low, high) if low < high - 1e-9 else None  # rounding leaves a sliver where there is nothing
