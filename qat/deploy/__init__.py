"""From a prepared model to files: convert, certificate, checkpoint."""

from qat.deploy.checkpoint import load, save
from qat.deploy.convert import Certificate, convert

__all__ = ["Certificate", "convert", "load", "save"]
