// Words before a query's look-up tables: how its scores are counted.
const TABLE_HEADER: u32 = 8u;
const TABLE_ROW: u32 = TABLE_HEADER + ENTRIES;
