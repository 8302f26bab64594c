"""`cupy.cuda.device`, from which array-api-compat takes the class."""

from .._fake import Device as Device
