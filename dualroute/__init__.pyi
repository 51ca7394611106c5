from dualroute.errors import UserError as UserError
from dualroute.library import (
    Model as Model,
)
from dualroute.library import (
    Run as Run,
)
from dualroute.library import (
    convert as convert,
)
from dualroute.library import (
    distill as distill,
)
from dualroute.library import (
    finetune as finetune,
)
from dualroute.library import (
    load as load,
)
from dualroute.library import (
    prepare as prepare,
)
from dualroute.library import (
    prune as prune,
)
from dualroute.library import (
    quantize as quantize,
)
from dualroute.library import (
    train as train,
)

__version__: str
