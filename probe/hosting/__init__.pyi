from ._loading import check_host as check_host
from ._loading import load_hosted as load_hosted
from ._loading import open_host as open_host
from ._server_view import server_view as server_view
