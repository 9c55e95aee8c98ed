"""FX passes on Dynamo's graph: one file each, run by `pipeline`. May import `ops`, `report`,
`config`."""
