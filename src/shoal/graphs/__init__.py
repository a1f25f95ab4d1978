"""Ways to compute the same with other matrix products, one file each: found by their file name, as `shoal ls graphs`
shows. `fused` puts them on a live model."""

from shoal.graphs._fused import Fused, fused

__all__ = ["Fused", "fused"]
