"""The class weights [C, D]: heads, sharding, sampling of classes, losses."""
