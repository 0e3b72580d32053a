"""The exact velocity of Gaussian data under a rectified flow."""


def gaussian_velocity(m: float = 0.5, delta: float = 0.8):
    """v*(x, σ) of data N(m, δ²): affine in x. Returns (velocity, slope)."""

    def slope(sigma):
        return (sigma - (1 - sigma) * delta**2) / ((1 - sigma) ** 2 * delta**2 + sigma**2)

    def velocity(x, sigma, root=None):
        sigma = sigma.to(x).reshape(-1, *([1] * (x.ndim - 1)))
        return -m + slope(sigma) * (x - (1 - sigma) * m)

    return velocity, slope
