from rdsnet.config import Config as Config
from rdsnet.config import get_config as get_config
from rdsnet.model.build import build_model as build_model
from rdsnet.model.rdsnet import RDSNet as RDSNet
from rdsnet.predict.predictor import Predictor as Predictor
from rdsnet.predict.predictor import load as load
from rdsnet.refine.boxes import RefinedBoxes as RefinedBoxes
from rdsnet.refine.boxes import Refiner as Refiner
from rdsnet.refine.boxes import fit_refiner as fit_refiner
from rdsnet.refine.boxes import refine_boxes as refine_boxes

__version__: str
