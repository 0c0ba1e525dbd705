"""The laptop of the kernel tests, for the tests of this folder too."""

from tests.kernel.conftest import _namespaces, lab, laptop

__all__ = ["_namespaces", "lab", "laptop"]
