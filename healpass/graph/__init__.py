"""FX passes on Dynamo's graph: one file each, run by `pipeline`. Import `ops` and `report`."""
