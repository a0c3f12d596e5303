"""The policy snapshot stream: what the cluster says, compiled record by record and followed by extproc.

watches ──changed──▶ Compiled ──records──▶ Feed (generations, checksum, recent changes) ──▶ PolicyServer ──▶ extproc
                        ▲ weights                                                     ◀── loads of the engines
"""
