"""What the runtime looks up while it runs: engines and models that are installed."""

from importlib.metadata import entry_points
from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_data_files, copy_metadata

from edge_slm_runtime.engines import ENGINES
from edge_slm_runtime.installed import GROUP

datas = []
hiddenimports = [name for name in ENGINES if find_spec(name)]
hiddenimports += [f"edge_slm_runtime.engines.{c.partition(':')[0]}" for c in ENGINES.values()]
for model in entry_points(group=GROUP):
    assert model.dist, "an entry point that was found belongs to a package"
    hiddenimports.append(model.module)
    datas += collect_data_files(model.module) + copy_metadata(model.dist.name)
# The numba engine keeps its machine code by the digest of these sources.
module_collection_mode = {
    f"edge_slm_runtime.{name}": "pyz+py" for name in ("kernels", "panels", "decoder")
}
