"""The shipped bundle, the server's page, and the version."""

from PyInstaller.utils.hooks import collect_data_files, copy_metadata

datas = collect_data_files("edge_slm") + copy_metadata("edge-slm")
