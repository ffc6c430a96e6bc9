from ._host import Deployment as Deployment
from ._host import Host as Host
from ._wire import GO_ON as GO_ON
from ._wire import PassingError as PassingError
from ._wire import failure as failure
from ._wire import read_response as read_response
from ._wire import read_saved as read_saved
from ._wire import refusal as refusal
