"""The ComfyUI side: schemas, the memory manager, progress. A node is a schema and a few lines that call the core."""

from .ask import Hunyuan3Ask, Hunyuan3Continue
from .compat import ComfyExtension, io
from .conditioning import Hunyuan3Conditioning
from .folders import register
from .images import Hunyuan3ImageConditioning
from .loader import Hunyuan3Loader
from .resolution import Hunyuan3Resolution
from .sampler import Hunyuan3Sampler
from .step_cache import Hunyuan3StepCache
from .think import Hunyuan3Think
from .vae import Hunyuan3VAEDecode, Hunyuan3VAEEncode


class Hunyuan3Extension(ComfyExtension):
    """What ComfyUI asks for the package's nodes."""

    def __init__(self) -> None:
        super().__init__()
        register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Hunyuan3Loader,
            Hunyuan3Conditioning,
            Hunyuan3Resolution,
            Hunyuan3Sampler,
            Hunyuan3VAEDecode,
            Hunyuan3VAEEncode,
            Hunyuan3StepCache,
            Hunyuan3ImageConditioning,
            Hunyuan3Think,
            Hunyuan3Ask,
            Hunyuan3Continue,
        ]
