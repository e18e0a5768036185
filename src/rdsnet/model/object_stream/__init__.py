"""Object streams (3.1): each gives boxes, classes and object representations."""

from rdsnet.model.object_stream.dense import Common, DenseStream, Positives, Raw
from rdsnet.model.object_stream.fcos import FCOSStream
from rdsnet.model.object_stream.retinanet import RetinaNetStream
from rdsnet.model.object_stream.suppression import Found
from rdsnet.model.object_stream.yolact import YolactStream

__all__ = ["Common", "DenseStream", "FCOSStream", "Found", "Positives", "Raw", "RetinaNetStream", "YolactStream"]
