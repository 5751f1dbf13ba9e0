"""ONNX in, ONNX that explains itself out. Knows no DICOM and no runtime.

::

    compile(model, method)          compiler.py   the whole, on one page
      Facts                         prepare.py    types, shapes, constants, whatever the free sizes
      explained_scores, ...         layers.py     which score, image and layer
        layouts                     positions.py  where on the image a tensor's elements lie
      select.choose                 select.py     which class: target, seed, or the best k
      METHODS                       methods/      from gradients to maps; rerun.py for many images
      pull_back                     backward.py   the walk; expand.py for operators without a rule,
                                                  stretch.py where most of a cotangent is zero
        GRADIENT, GUIDED, ...       rules/        one function per operator
        Graph, Tensor               emit.py       writes the nodes; fusion.py keeps kernels fused
      check_untouched               check.py      the vendor's part is byte for byte the vendor's

Only onnx and numpy are needed::

    from dicom_xai.autodiff import compile

    compiled = compile(onnx.load("model.onnx"), "grad-cam")
    onnx.save(compiled.model, "explained.onnx")
"""

from .compiler import COMPILER_VERSION, Compiled, Report, compile
from .methods import (
    METHODS,
    AttentionRollout,
    ExpectedGradients,
    IntegratedGradients,
    LayerwiseRelevance,
    SmoothGrad,
)
from .rules.quantised import STRAIGHT_THROUGH
from .select import BySeed, ByTarget, TopClasses

__all__ = [
    "COMPILER_VERSION",
    "METHODS",
    "STRAIGHT_THROUGH",
    "AttentionRollout",
    "BySeed",
    "ByTarget",
    "Compiled",
    "ExpectedGradients",
    "IntegratedGradients",
    "LayerwiseRelevance",
    "Report",
    "SmoothGrad",
    "TopClasses",
    "compile",
]
