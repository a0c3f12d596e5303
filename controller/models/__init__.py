"""The model loader: weights from a hub, a store, a registry or a folder onto a volume, whole or not at all.

``python3 -m controller.models '<json>'`` is what a download Job runs. In order: the request is decoded
(`request`), the target folder is opened without following links (`tree`) and locked (`lock`), the source is asked for
its list (`sources`), what is there already is kept, missing bytes are held against free space, every missing file is
loaded in pieces into a part that survives a kill (`part`, `transfer`), verified (`digest`), and put in place
(`blobs`). The ready marker (`marker`) is written last: a folder with a marker is complete, and a later run with the
same request returns at once, without the network.

Exit codes: 0 ready, 1 try again later, 3 lasting (somebody has to change the named field), 143 told to stop.
"""
