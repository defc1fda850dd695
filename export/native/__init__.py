"""`libtsa_ort.so`, ONNX Runtime's operator library: `build_library`, and `forms_of` an exported file."""

from tsa_compile.export.native.library import build_library, forms_of

__all__ = ["build_library", "forms_of"]
