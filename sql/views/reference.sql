-- The interface described by its own comments: what docs/sql.md is made from. Types of ours go without their schema, whatever the search path.

create or replace view pgharness.sql_reference with (security_invoker = true) as
with object as (
    select case c.relkind when 'v' then 'view' when 'c' then 'type' else 'table' end as section, c.relname::text as name, null as signature, null as returns,
           coalesce(obj_description(c.oid, 'pg_class'), obj_description(c.reltype, 'pg_type')) as comment, c.oid
      from pg_catalog.pg_class as c
     where c.relnamespace = 'pgharness'::regnamespace and c.relkind in ('r', 'p', 'v', 'c')
    union all
    select 'function', p.proname::text, format('%s(%s)', p.proname, replace(pg_get_function_identity_arguments(p.oid), 'pgharness.', '')), pg_get_function_result(p.oid),
           obj_description(p.oid, 'pg_proc'), p.oid
      from pg_catalog.pg_proc as p
     where p.pronamespace = 'pgharness'::regnamespace and p.proname not like '\_%'
    union all
    select 'notification', 'pgharness', null, null, obj_description('pgharness._announce_run()'::regprocedure, 'pg_proc'), 'pgharness._announce_run()'::regprocedure
)
select o.section, o.name, o.signature, null as part, 0 as position, null as item, replace(o.returns, 'pgharness.', '') as type, null as default_value, o.comment
  from object as o
union all
select o.section, o.name, o.signature, 'column', a.attnum, a.attname::text, replace(format_type(a.atttypid, a.atttypmod), 'pgharness.', ''),
       case when a.attidentity <> '' or a.attgenerated <> '' then 'generated' else pg_get_expr(d.adbin, d.adrelid) end, col_description(a.attrelid, a.attnum)
  from object as o
  join pg_catalog.pg_attribute as a on a.attrelid = o.oid and a.attnum > 0 and not a.attisdropped
  left join pg_catalog.pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
 where o.section in ('table', 'view', 'type')
union all
select o.section, o.name, o.signature, case when arg.mode = 't' then 'result' else 'argument' end, arg.position, arg.name, replace(format_type(arg.type, null), 'pgharness.', ''),
       pg_get_function_arg_default(o.oid, arg.position::integer), null
  from object as o
  join pg_catalog.pg_proc as p on p.oid = o.oid
 cross join lateral unnest(p.proargnames, coalesce(p.proallargtypes, p.proargtypes::oid[]), p.proargmodes) with ordinality as arg (name, type, mode, position)
 where o.section = 'function';
comment on view pgharness.sql_reference is
'One row per table, view, function, type and notification of schema pgharness (part is null), and per column, argument and result column of theirs, with types and comments: help from within SQL. Example: select item, type, comment from pgharness.sql_reference where name = ''run_progress'' order by position;';
comment on column pgharness.sql_reference.section is 'table, view, function, type or notification.';
comment on column pgharness.sql_reference.signature is 'A function''s name with its arguments, which tells functions of one name apart.';
comment on column pgharness.sql_reference.part is 'column, argument or result; null for the object itself.';
comment on column pgharness.sql_reference.position is 'Place among the parts (from 1); 0 for the object itself.';
comment on column pgharness.sql_reference.item is 'Name of the column or argument.';
comment on column pgharness.sql_reference.type is 'Of the part; of a function itself, what it returns.';
