"""The build of the package with GPU kernels: it packs op libraries that are built already."""

import os

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

VERSION = os.environ["CONTINUAL_TRANSFORMERS_VERSION"]


class BuiltDistribution(Distribution):
    """A distribution with compiled code, although nothing is compiled here."""

    def has_ext_modules(self):
        """Return True: the wheel is for one kind of machine."""
        return True


class AnyPython(bdist_wheel):
    """A wheel for any Python: the op libraries do not depend on it."""

    def get_tag(self):
        """Return the tag of the wheel."""
        return "py3", "none", super().get_tag()[2]


setup(
    version=VERSION,
    install_requires=[f"continual-transformers-tf=={VERSION}"],
    distclass=BuiltDistribution,
    cmdclass={"bdist_wheel": AnyPython},
)
