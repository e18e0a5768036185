"""Images of any kind in, `sv.Detections` out."""

from rdsnet.predict.predictor import Predictor, load

__all__ = ["Predictor", "load"]
