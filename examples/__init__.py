"""The example programs, each a script that runs by itself and through `graphflow run NAME`."""
