"""Object streams (3.1): each gives boxes, classes and object representations."""

from rdsnet.model.object_stream.dense import DenseStream, Found, Positives, Raw
from rdsnet.model.object_stream.retinanet import RetinaNetStream

__all__ = ["DenseStream", "Found", "Positives", "Raw", "RetinaNetStream"]
