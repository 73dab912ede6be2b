"""From a prepared model to files: convert, certificate, checkpoint."""

from qat.deploy.checkpoint import load, save
from qat.deploy.convert import Certificate, convert, resident_bytes
from qat.deploy.export import export
from qat.deploy.export import verify as verify_export
from qat.deploy.streaming import stream, without_weights

__all__ = ["Certificate", "convert", "export", "load", "resident_bytes", "save", "stream", "verify_export",
           "without_weights"]
