-- JSON Schema (draft 2020-12, as pydantic and people write it): check a value, check a schema, fill in defaults.
--
-- Between the private functions violations travel as one jsonb array of {"path", "problem"}, not as sets: a failing
-- alternative is then checked once and explained from what was found, so nested unions cost no more than they must.
-- The keywords that constrain are the rows of _list_keywords(); any other word is an annotation and means nothing.


-- Words for people ---------------------------------------------------------------------------------------------------

create or replace function pgharness._violation(at text, problem text) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return jsonb_build_object('path', _violation.at, 'problem', _violation.problem);
end;
$$;
comment on function pgharness._violation(text, text) is
'One violation as jsonb, to be appended to an array of them. Example: select pgharness._violation(''seed'', ''is missing'');';


create or replace function pgharness._shorten(word text, size integer) returns text
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return case when char_length(_shorten.word) <= _shorten.size then _shorten.word
                else left(_shorten.word, _shorten.size - 3) || '...' end;
end;
$$;
comment on function pgharness._shorten(text, integer) is
'A text cut to a size, with ... where something is left out. Example: select pgharness._shorten(''a long story'', 9);';


create or replace function pgharness._brief_json(value jsonb) returns text
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return _shorten(_brief_json.value::text, 60);
end;
$$;
comment on function pgharness._brief_json(jsonb) is
'A value as JSON text of at most 60 characters, for messages. Example: select pgharness._brief_json(''[1, 2]'');';


create or replace function pgharness._extend_path(at text, name text) returns text
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    if _extend_path.name !~ '^[^\[\].\s"]+$' then
        return format('%s[%s]', _extend_path.at, to_jsonb(_extend_path.name));
    end if;
    return case when _extend_path.at = '' then '' else _extend_path.at || '.' end || _extend_path.name;
end;
$$;
comment on function pgharness._extend_path(text, text) is
'The path of a property: a.b, or a["b c"] where the bare name would be ambiguous. Example: select pgharness._extend_path(''a'', ''b'');';


create or replace function pgharness._name_types(types jsonb) returns text
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return (
        select string_agg(case when t.name = 'null' then 'null'
                               when t.name ~ '^[aeiou]' then 'an ' || t.name
                               else 'a ' || t.name end, ' or ' order by t.n)
          from jsonb_array_elements_text(jsonb_build_array() || _name_types.types) with ordinality as t(name, n));
end;
$$;
comment on function pgharness._name_types(jsonb) is
'The words for a "type" keyword, one name or a list. Example: select pgharness._name_types(''["number", "null"]'');';


create or replace function pgharness._list_values(list jsonb) returns text
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return (
        select _shorten(string_agg(_brief_json(e.item), ', ' order by e.n), 240)
          from jsonb_array_elements(_list_values.list) with ordinality as e(item, n));
end;
$$;
comment on function pgharness._list_values(jsonb) is
'The items of an array, separated by commas and cut at 240 characters. Example: select pgharness._list_values(''["a", "b"]'');';


-- References, types, patterns and formats ----------------------------------------------------------------------------

create or replace function pgharness._split_reference(reference text) returns text[]
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    if _split_reference.reference = '#' then
        return '{}';
    elsif _split_reference.reference like '#/%' then
        return array(
            select replace(replace(s.step, '~1', '/'), '~0', '~')
              from string_to_table(substr(_split_reference.reference, 3), '/') with ordinality as s(step, n)
             order by s.n);
    end if;
    return null;
end;
$$;
comment on function pgharness._split_reference(text) is
'The steps of a reference into the same document, null for any other. Example: select pgharness._split_reference(''#/$defs/a~1b'');';


create or replace function pgharness._follow_reference(root jsonb, reference text) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_target jsonb := _follow_reference.root #> _split_reference(_follow_reference.reference);
begin
    if v_target is null then
        raise exception 'schema reference "%" leads nowhere', _follow_reference.reference
            using errcode = 'PH002', hint = 'Check the schema with: select * from pgharness.schema_problems(schema);';
    end if;
    return v_target;
end;
$$;
comment on function pgharness._follow_reference(jsonb, text) is
'The schema that a $ref means. Raises PH002 where there is none. Example: select pgharness._follow_reference(schema, ''#/$defs/Rubric'');';


create or replace function pgharness._has_type(value jsonb, types jsonb) returns boolean
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_type text := jsonb_typeof(_has_type.value);
begin
    if _has_type.types ? v_type then                         -- "?" looks into a list and at a single name alike
        return true;
    elsif v_type = 'number' and _has_type.types ? 'integer' then
        return _has_type.value::numeric % 1 = 0;             -- 1.0 is an integer
    end if;
    return false;
end;
$$;
comment on function pgharness._has_type(jsonb, jsonb) is
'Whether a value has one of the types of a "type" keyword. Example: select pgharness._has_type(''1.0'', ''"integer"'');';


create or replace function pgharness._translate_pattern(pattern text) returns text
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return coalesce((
        select string_agg(case t.token[1] when '\b' then '\y'
                                          when '\B' then '\Y'
                                          when '.' then '[^\n\r]'
                                          else t.token[1] end, '' order by t.n)
          from regexp_matches(_translate_pattern.pattern, '\\.|\[(?:\\.|[^\]\\])*\]|.', 'g')
               with ordinality as t(token, n)), '');
end;
$$;
comment on function pgharness._translate_pattern(text) is
'A JSON Schema pattern as a Postgres regular expression: word boundaries and "." mean something else there. Match it with collate "C", so that \w is the same everywhere. Example: select ''a b'' ~ pgharness._translate_pattern(''\bb'') collate "C";';


create or replace function pgharness._fits_format(word text, format text) returns boolean
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_word text collate "C" := _fits_format.word;
begin
    case _fits_format.format
        when 'date' then
            if v_word !~ '^(?!0000)[0-9]{4}-(0[1-9]|1[0-2])-[0-9]{2}$' then
                return false;
            end if;
            return substr(v_word, 9)::integer between 1 and extract(day from
                make_date(left(v_word, 4)::integer, substr(v_word, 6, 2)::integer, 1) + interval '1 month - 1 day');
        when 'date-time' then                                -- without an offset too, as pydantic takes it
            return v_word ~ ('^.{10}[Tt ]([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?'
                             '([Zz]|[-+]([01][0-9]|2[0-3]):[0-5][0-9])?$')
                   and _fits_format(left(v_word, 10), 'date');
        when 'email' then
            return v_word ~ '^[^@\s]+@[^@\s]+$';
        when 'uuid' then
            return v_word ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$';
        when 'uri' then
            return v_word ~ '^[A-Za-z][A-Za-z0-9+.-]*:\S+$';
        else
            return true;
    end case;
end;
$$;
comment on function pgharness._fits_format(text, text) is
'Whether a text looks like a date, date-time, email, uuid or uri; true for any other format. Example: select pgharness._fits_format(''2025-02-29'', ''date'');';


-- Checking a value ---------------------------------------------------------------------------------------------------

create or replace function pgharness._check_size(
    schema jsonb, at text, size integer, keyword text, singular text, plural text) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_least jsonb := _check_size.schema -> ('min' || _check_size.keyword);
    v_most  jsonb := _check_size.schema -> ('max' || _check_size.keyword);
    v_has   text  := format('has %s %s', _check_size.size,
                            case _check_size.size when 1 then _check_size.singular else _check_size.plural end);
begin
    if _check_size.size < v_least::numeric then
        return jsonb_build_array(_violation(_check_size.at, format('%s, fewer than the minimum %s', v_has, v_least)));
    elsif _check_size.size > v_most::numeric then
        return jsonb_build_array(_violation(_check_size.at, format('%s, more than the maximum %s', v_has, v_most)));
    end if;
    return '[]';
end;
$$;
comment on function pgharness._check_size(jsonb, text, integer, text, text, text) is
'Violations of the min and max keywords that count something. Example: select pgharness._check_size(''{"minItems": 1}'', ''cases'', 0, ''Items'', ''item'', ''items'');';


create or replace function pgharness._check_number(schema jsonb, value jsonb, at text) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_number   numeric := _check_number.value::numeric;
    v_brief    text    := _brief_json(_check_number.value);
    v_problems text[]  := '{}';
    v_limit    jsonb;
begin
    v_limit := _check_number.schema -> 'minimum';
    if v_number < v_limit::numeric then
        v_problems := v_problems || format('is %s, less than the minimum %s', v_brief, v_limit);
    end if;
    v_limit := _check_number.schema -> 'maximum';
    if v_number > v_limit::numeric then
        v_problems := v_problems || format('is %s, more than the maximum %s', v_brief, v_limit);
    end if;
    v_limit := _check_number.schema -> 'exclusiveMinimum';
    if v_number <= v_limit::numeric then
        v_problems := v_problems || format('is %s, must be more than %s', v_brief, v_limit);
    end if;
    v_limit := _check_number.schema -> 'exclusiveMaximum';
    if v_number >= v_limit::numeric then
        v_problems := v_problems || format('is %s, must be less than %s', v_brief, v_limit);
    end if;
    v_limit := _check_number.schema -> 'multipleOf';
    if v_number % v_limit::numeric <> 0 then
        v_problems := v_problems || format('is %s, not a multiple of %s', v_brief, v_limit);
    end if;
    if v_problems = '{}' then
        return '[]';
    end if;
    return (select jsonb_agg(_violation(_check_number.at, p.problem)) from unnest(v_problems) as p(problem));
end;
$$;
comment on function pgharness._check_number(jsonb, jsonb, text) is
'Violations of a number. Example: select pgharness._check_number(''{"maximum": 2}'', ''3.5'', ''temperature'');';


create or replace function pgharness._check_string(schema jsonb, value jsonb, at text) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_text    text  := _check_string.value #>> '{}';
    v_pattern text  := _check_string.schema ->> 'pattern';
    v_format  text  := _check_string.schema ->> 'format';
    v_found   jsonb := _check_size(_check_string.schema, _check_string.at, char_length(v_text),
                                   'Length', 'character', 'characters');
begin
    if v_text !~ (_translate_pattern(v_pattern) collate "C") then
        v_found := v_found || _violation(_check_string.at, format(
            'is %s, which does not match the pattern %s', _brief_json(_check_string.value), v_pattern));
    end if;
    if not _fits_format(v_text, v_format) then
        v_found := v_found || _violation(_check_string.at, format(
            'is %s, not a valid %s', _brief_json(_check_string.value), v_format));
    end if;
    return v_found;
end;
$$;
comment on function pgharness._check_string(jsonb, jsonb, text) is
'Violations of a string. Raises 2201B on an invalid pattern. Example: select pgharness._check_string(''{"minLength": 3}'', ''"ab"'', ''name'');';


create or replace function pgharness._check_array(root jsonb, schema jsonb, value jsonb, at text, depth integer)
    returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_depth integer := _check_array.depth + 1;
    v_found jsonb   := _check_size(_check_array.schema, _check_array.at, jsonb_array_length(_check_array.value),
                                   'Items', 'item', 'items');
begin
    if _check_array.schema ?| array['items', 'prefixItems'] then
        v_found := v_found || coalesce((
            select jsonb_agg(f.violation)
              from jsonb_array_elements(_check_array.value) with ordinality as i(item, n)
             cross join lateral jsonb_array_elements(_check_value(
                       _check_array.root,
                       coalesce(_check_array.schema -> 'prefixItems' -> (i.n - 1)::integer,
                                _check_array.schema -> 'items', 'true'),
                       i.item, format('%s[%s]', _check_array.at, i.n - 1), v_depth)) as f(violation)), '[]');
    end if;
    if _check_array.schema -> 'uniqueItems' = 'true' then
        v_found := v_found || coalesce((
            select jsonb_agg(_violation(_check_array.at, format(
                       'has the same item %s at %s', _brief_json(d.item), d.places)) order by d.first)
              from (select i.item, min(i.n) as first, string_agg((i.n - 1)::text, ' and ' order by i.n) as places
                      from jsonb_array_elements(_check_array.value) with ordinality as i(item, n)
                     group by i.item
                    having count(*) > 1) as d), '[]');
    end if;
    if _check_array.schema ? 'contains' and not exists (
        select from jsonb_array_elements(_check_array.value) as i(item)
         where _check_value(_check_array.root, _check_array.schema -> 'contains', i.item, '', v_depth) = '[]')
    then
        v_found := v_found || _violation(_check_array.at, 'has no item of the kind that it must contain');
    end if;
    return v_found;
end;
$$;
comment on function pgharness._check_array(jsonb, jsonb, jsonb, text, integer) is
'Violations of an array and its items. Raises as _check_value does. Example: see schema_violations.';


create or replace function pgharness._check_presence(schema jsonb, value jsonb, at text) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return coalesce((
        select jsonb_agg(_violation(_extend_path(_check_presence.at, m.name), m.problem))
          from (select r.name, 'is missing' as problem
                  from jsonb_array_elements_text(_check_presence.schema -> 'required') as r(name)
                 union all
                select n.name, format('is missing, required with %s', to_jsonb(d.given))
                  from jsonb_each(_check_presence.schema -> 'dependentRequired') as d(given, needed)
                 cross join lateral jsonb_array_elements_text(d.needed) as n(name)
                 where _check_presence.value ? d.given) as m
         where not _check_presence.value ? m.name), '[]');
end;
$$;
comment on function pgharness._check_presence(jsonb, jsonb, text) is
'Violations of required and dependentRequired. Example: select pgharness._check_presence(''{"required": ["seed"]}'', ''{}'', '''');';


create or replace function pgharness._check_object(root jsonb, schema jsonb, value jsonb, at text, depth integer)
    returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_depth      integer := _check_object.depth + 1;
    v_properties jsonb   := coalesce(_check_object.schema -> 'properties', '{}');
    v_patterns   jsonb   := coalesce(_check_object.schema -> 'patternProperties', '{}');
    v_others     jsonb   := coalesce(_check_object.schema -> 'additionalProperties', 'true');
    v_found      jsonb   := _check_presence(_check_object.schema, _check_object.value, _check_object.at)
                            || _check_size(_check_object.schema, _check_object.at,
                                           (select count(*)::integer from jsonb_object_keys(_check_object.value)),
                                           'Properties', 'property', 'properties');
    v_name       text;
    v_item       jsonb;
    v_path       text;
    v_names      jsonb;
    v_is_known   boolean;
    v_sub        jsonb;
begin
    for v_name, v_item in select p.name, p.item from jsonb_each(_check_object.value) as p(name, item) loop
        v_path := _extend_path(_check_object.at, v_name);
        if _check_object.schema ? 'propertyNames' then
            v_names := _check_value(_check_object.root, _check_object.schema -> 'propertyNames', to_jsonb(v_name),
                                    v_path, v_depth);
            v_found := v_found || coalesce((
                select jsonb_agg(_violation(f.violation ->> 'path', 'name ' || (f.violation ->> 'problem')))
                  from jsonb_array_elements(v_names) as f(violation)), '[]');
        end if;
        v_is_known := v_properties ? v_name;
        if v_is_known then
            v_found := v_found || _check_value(_check_object.root, v_properties -> v_name, v_item, v_path, v_depth);
        end if;
        if v_patterns <> '{}' then
            for v_sub in
                select p.sub from jsonb_each(v_patterns) as p(pattern, sub)
                 where v_name ~ (_translate_pattern(p.pattern) collate "C")
            loop
                v_is_known := true;
                v_found := v_found || _check_value(_check_object.root, v_sub, v_item, v_path, v_depth);
            end loop;
        end if;
        if not v_is_known and v_others = 'false' then
            v_found := v_found || _violation(v_path, 'is not a known property' || coalesce(
                (select '; known are ' || _list_values(jsonb_agg(k.name order by k.name collate "C"))
                   from jsonb_object_keys(v_properties) as k(name)), ''));
        elsif not v_is_known then
            v_found := v_found || _check_value(_check_object.root, v_others, v_item, v_path, v_depth);
        end if;
    end loop;
    return v_found;
end;
$$;
comment on function pgharness._check_object(jsonb, jsonb, jsonb, text, integer) is
'Violations of an object and its properties. Raises as _check_value does. Example: see schema_violations.';


create or replace function pgharness._resolve_schema(root jsonb, schema jsonb) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_schema jsonb := _resolve_schema.schema;
begin
    for v_step in 1 .. 100 loop                              -- bounded: a cycle of references has no end
        exit when v_schema ? 'type' or not v_schema ? '$ref';
        v_schema := _follow_reference(_resolve_schema.root, v_schema ->> '$ref');
    end loop;
    return v_schema;
end;
$$;
comment on function pgharness._resolve_schema(jsonb, jsonb) is
'The schema behind references, up to the first that names a type. Raises PH002 on a bad reference. Example: select pgharness._resolve_schema(schema, schema -> ''items'');';


create or replace function pgharness._rate_alternative(root jsonb, schema jsonb, value jsonb) returns integer
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_schema jsonb := _resolve_schema(_rate_alternative.root, _rate_alternative.schema);
begin
    if v_schema = 'false' or v_schema ? 'type' and not _has_type(_rate_alternative.value, v_schema -> 'type') then
        return 0;
    elsif _rate_alternative.value <> v_schema -> 'const' then
        return 1;
    elsif jsonb_typeof(_rate_alternative.value) = 'object' and exists (
        select from jsonb_each(v_schema -> 'properties') as p(name, sub)
         where _rate_alternative.value -> p.name <> p.sub -> 'const')
    then
        return 1;
    end if;
    return 2;
end;
$$;
comment on function pgharness._rate_alternative(jsonb, jsonb, jsonb) is
'How likely a value was meant for an alternative: 0 its type differs, 1 a constant such as a discriminator differs, 2 neither. Raises PH002 on a bad reference. Example: select pgharness._rate_alternative(''{}'', ''{"type": "null"}'', ''3'');';


create or replace function pgharness._explain_alternatives(
    root jsonb, alternatives jsonb, failures jsonb, value jsonb, at text) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_ratings integer[] := array(
        select _rate_alternative(_explain_alternatives.root, a.sub, _explain_alternatives.value)
          from jsonb_array_elements(_explain_alternatives.alternatives) with ordinality as a(sub, n)
         order by a.n);
    v_best    integer   := (select max(r.rating) from unnest(v_ratings) as r(rating));
    v_likely  integer[] := array_positions(v_ratings, v_best);
    v_text    text;
begin
    if cardinality(v_likely) = 1 then
        return _explain_alternatives.failures -> (v_likely[1] - 1);
    elsif v_best = 0 then
        select string_agg(t.names, ' or ' order by t.first) into v_text
          from (select _name_types(_resolve_schema(_explain_alternatives.root, a.sub) -> 'type') as names,
                       min(a.n) as first
                  from jsonb_array_elements(_explain_alternatives.alternatives) with ordinality as a(sub, n)
                 group by 1) as t;
        v_text := 'is ' || coalesce(_brief_json(_explain_alternatives.value) || ', not ' || v_text, 'not allowed');
    else
        select string_agg(ltrim(substr(f.first ->> 'path', char_length(_explain_alternatives.at) + 1)
                                || ' ' || (f.first ->> 'problem'), '. '), '; or ' order by l.n) into v_text
          from unnest(v_likely) as l(n)
         cross join lateral (select _explain_alternatives.failures -> (l.n - 1) -> 0) as f(first);
        v_text := format('fits none of the %s alternatives: %s', cardinality(v_ratings), _shorten(v_text, 240));
    end if;
    return jsonb_build_array(_violation(_explain_alternatives.at, v_text));
end;
$$;
comment on function pgharness._explain_alternatives(jsonb, jsonb, jsonb, jsonb, text) is
'Why a value fits no alternative, told for those it was likely meant for; "failures" holds what was found for each. Raises PH002 on a bad reference. Example: see _check_alternatives.';


create or replace function pgharness._check_alternatives(
    root jsonb, schema jsonb, keyword text, value jsonb, at text, depth integer) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_alternatives jsonb    := _check_alternatives.schema -> _check_alternatives.keyword;
    v_failures     jsonb    := '[]';
    v_fitting      bigint[] := '{}';
    v_found        jsonb;
    v_sub          jsonb;
    v_number       bigint;
begin
    for v_sub, v_number in
        select a.sub, a.n from jsonb_array_elements(v_alternatives) with ordinality as a(sub, n) order by a.n
    loop
        v_found := _check_value(_check_alternatives.root, v_sub, _check_alternatives.value,
                                _check_alternatives.at, _check_alternatives.depth + 1);
        if v_found = '[]' and _check_alternatives.keyword = 'anyOf' then
            return '[]';
        elsif v_found = '[]' then
            v_fitting := v_fitting || v_number;
        end if;
        v_failures := v_failures || jsonb_build_array(v_found);
    end loop;
    if cardinality(v_fitting) = 1 then
        return '[]';
    elsif cardinality(v_fitting) > 1 then
        return jsonb_build_array(_violation(_check_alternatives.at, format(
            'is %s, which fits alternatives %s, must fit exactly one',
            _brief_json(_check_alternatives.value), array_to_string(v_fitting, ' and '))));
    end if;
    return _explain_alternatives(_check_alternatives.root, v_alternatives, v_failures,
                                 _check_alternatives.value, _check_alternatives.at);
end;
$$;
comment on function pgharness._check_alternatives(jsonb, jsonb, text, jsonb, text, integer) is
'Violations of anyOf or oneOf. Raises as _check_value does. Example: select pgharness._check_alternatives(''{}'', ''{"anyOf": [{"type": "null"}]}'', ''anyOf'', ''3'', ''seed'', 0);';


create or replace function pgharness._check_combinations(root jsonb, schema jsonb, value jsonb, at text, depth integer)
    returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_depth   integer := _check_combinations.depth + 1;
    v_found   jsonb   := '[]';
    v_keyword text;
    v_sub     jsonb;
begin
    for v_sub in select a.sub from jsonb_array_elements(_check_combinations.schema -> 'allOf') as a(sub) loop
        v_found := v_found || _check_value(_check_combinations.root, v_sub, _check_combinations.value,
                                           _check_combinations.at, v_depth);
    end loop;
    foreach v_keyword in array array['anyOf', 'oneOf'] loop
        if _check_combinations.schema ? v_keyword then
            v_found := v_found || _check_alternatives(_check_combinations.root, _check_combinations.schema, v_keyword,
                                                      _check_combinations.value, _check_combinations.at, v_depth);
        end if;
    end loop;
    if _check_combinations.schema ? 'not' and _check_value(
        _check_combinations.root, _check_combinations.schema -> 'not', _check_combinations.value, '', v_depth) = '[]'
    then
        v_found := v_found || _violation(_check_combinations.at, format(
            'is %s, of the kind that it must not be', _brief_json(_check_combinations.value)));
    end if;
    if _check_combinations.schema ? 'if' then
        v_sub := _check_combinations.schema -> case
            when _check_value(_check_combinations.root, _check_combinations.schema -> 'if',
                              _check_combinations.value, '', v_depth) = '[]' then 'then' else 'else' end;
        v_found := v_found || _check_value(_check_combinations.root, coalesce(v_sub, 'true'),
                                           _check_combinations.value, _check_combinations.at, v_depth);
    end if;
    return v_found;
end;
$$;
comment on function pgharness._check_combinations(jsonb, jsonb, jsonb, text, integer) is
'Violations of allOf, anyOf, oneOf, not and if/then/else. Raises as _check_value does. Example: see schema_violations.';


create or replace function pgharness._check_value(root jsonb, schema jsonb, value jsonb, at text, depth integer)
    returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_found jsonb := '[]';
begin
    if _check_value.schema = 'true' then
        return '[]';
    elsif _check_value.schema = 'false' then
        return jsonb_build_array(_violation(_check_value.at, 'is not allowed'));
    elsif jsonb_typeof(_check_value.schema) <> 'object' then
        raise exception 'schema % is not an object or a boolean', _brief_json(_check_value.schema)
            using errcode = 'PH002';
    elsif _check_value.depth > 150 then
        raise exception 'schema and value nest more than 150 levels at "%"', _check_value.at
            using errcode = 'PH002', hint = 'Check the schema with: select * from pgharness.schema_problems(schema);';
    end if;
    if _check_value.schema ? '$ref' then
        v_found := _check_value(_check_value.root, _follow_reference(_check_value.root, _check_value.schema ->> '$ref'),
                                _check_value.value, _check_value.at, _check_value.depth + 1);
    end if;
    if _check_value.schema ? 'type' and not _has_type(_check_value.value, _check_value.schema -> 'type') then
        return v_found || _violation(_check_value.at, format(  -- a wrong type says all; the rest would repeat it
            'is %s, not %s', _brief_json(_check_value.value), _name_types(_check_value.schema -> 'type')));
    end if;
    if _check_value.schema ? 'enum' and not exists (
        select from jsonb_array_elements(_check_value.schema -> 'enum') as e(item) where e.item = _check_value.value)
    then
        v_found := v_found || _violation(_check_value.at, format(
            'is %s, not one of %s', _brief_json(_check_value.value), _list_values(_check_value.schema -> 'enum')));
    end if;
    if _check_value.value <> _check_value.schema -> 'const' then
        v_found := v_found || _violation(_check_value.at, format(
            'is %s, must be %s', _brief_json(_check_value.value), _brief_json(_check_value.schema -> 'const')));
    end if;
    v_found := v_found || case jsonb_typeof(_check_value.value)
        when 'number' then _check_number(_check_value.schema, _check_value.value, _check_value.at)
        when 'string' then _check_string(_check_value.schema, _check_value.value, _check_value.at)
        when 'array' then _check_array(
            _check_value.root, _check_value.schema, _check_value.value, _check_value.at, _check_value.depth)
        when 'object' then _check_object(
            _check_value.root, _check_value.schema, _check_value.value, _check_value.at, _check_value.depth)
        else '[]' end;
    if _check_value.schema ?| array['allOf', 'anyOf', 'oneOf', 'not', 'if'] then
        v_found := v_found || _check_combinations(
            _check_value.root, _check_value.schema, _check_value.value, _check_value.at, _check_value.depth);
    end if;
    return v_found;
end;
$$;
comment on function pgharness._check_value(jsonb, jsonb, jsonb, text, integer) is
'Violations of a value at one place, as a jsonb array; root is where references start. Raises PH002 on a bad reference or past 150 levels, and Postgres''s own errors on a schema that schema_problems refuses. Example: select pgharness._check_value(''{}'', ''{"maximum": 2}'', ''3.5'', ''temperature'', 0);';


create or replace function pgharness.schema_violations(schema jsonb, value jsonb)
    returns table (path text, problem text)
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return query
    select f.violation ->> 'path', f.violation ->> 'problem'
      from jsonb_array_elements(_check_value(
               coalesce(schema_violations.schema, 'true'), coalesce(schema_violations.schema, 'true'),
               coalesce(schema_violations.value, 'null'), '', 0)) as f(violation);
end;
$$;
comment on function pgharness.schema_violations(jsonb, jsonb) is
'What is wrong with a value by a JSON Schema: one row per problem, none when it fits. The path of the value itself is empty; a missing schema accepts anything and a missing value is null. Raises PH002 on a bad reference or past 150 levels. Example: select * from pgharness.schema_violations(''{"properties": {"temperature": {"maximum": 2}}}'', ''{"temperature": 3.5}'');';


-- Checking a schema --------------------------------------------------------------------------------------------------
-- rows 50: from the usual guess of 1000 the planner expects so much of these lists that it compiles the queries (jit).

create or replace function pgharness._list_keywords() returns table (keyword text, shape text, is_in_place boolean)
    language plpgsql immutable rows 50 security invoker set search_path = pgharness, pg_temp
as $$
begin
    return query
    select k.keyword, k.shape, k.keyword in ('allOf', 'anyOf', 'oneOf', 'not', 'if', 'then', 'else')
      from (values
            ('type', 'types'), ('enum', 'list'), ('const', 'value'),
            ('minimum', 'number'), ('maximum', 'number'), ('multipleOf', 'positive number'),
            ('exclusiveMinimum', 'number'), ('exclusiveMaximum', 'number'),
            ('minLength', 'count'), ('maxLength', 'count'), ('pattern', 'pattern'), ('format', 'string'),
            ('minItems', 'count'), ('maxItems', 'count'), ('uniqueItems', 'boolean'),
            ('items', 'schema'), ('prefixItems', 'schemas'), ('contains', 'schema'),
            ('minProperties', 'count'), ('maxProperties', 'count'),
            ('required', 'names'), ('dependentRequired', 'name lists'),
            ('properties', 'named schemas'), ('patternProperties', 'named schemas'),
            ('additionalProperties', 'schema'), ('propertyNames', 'schema'),
            ('allOf', 'schemas'), ('anyOf', 'schemas'), ('oneOf', 'schemas'), ('not', 'schema'),
            ('if', 'schema'), ('then', 'schema'), ('else', 'schema'),
            ('$ref', 'string'), ('$defs', 'named schemas'), ('definitions', 'named schemas'),
            ('minContains', 'unsupported'), ('maxContains', 'unsupported'), ('dependentSchemas', 'unsupported'),
            ('unevaluatedItems', 'unsupported'), ('unevaluatedProperties', 'unsupported'),
            ('additionalItems', 'unsupported'), ('dependencies', 'unsupported'), ('nullable', 'unsupported'),
            ('$dynamicRef', 'unsupported'), ('$recursiveRef', 'unsupported')
           ) as k(keyword, shape);
end;
$$;
comment on function pgharness._list_keywords() is
'One row per keyword that constrains values: the shape of its argument, and whether its schemas apply to the same value. Example: select * from pgharness._list_keywords();';


create or replace function pgharness._list_subschemas(root jsonb)
    returns table (pointer text[], parent text[], is_in_place boolean, at text, subschema jsonb)
    language plpgsql immutable rows 50 security invoker set search_path = pgharness, pg_temp
as $$
begin
    return query
    with recursive node as (
        select '{}'::text[] as pointer, null::text[] as parent, false as is_in_place, '' as at,
               _list_subschemas.root as sub
         union all
        select n.pointer || c.steps, n.pointer, c.is_in_place, c.at, c.sub
          from node as n
         cross join lateral (
               select k.keyword, k.shape, k.is_in_place, _extend_path(n.at, k.keyword) as at,
                      n.sub -> k.keyword as argument, jsonb_typeof(n.sub -> k.keyword) as kind
                 from _list_keywords() as k
                where jsonb_typeof(n.sub) = 'object' and n.sub ? k.keyword) as k
         cross join lateral (
               select array[k.keyword] as steps, k.is_in_place, k.at, k.argument as sub
                where k.shape = 'schema'
                union all
               select array[k.keyword, (e.n - 1)::text], k.is_in_place, format('%s[%s]', k.at, e.n - 1), e.item
                 from jsonb_array_elements(case k.kind when 'array' then k.argument end) with ordinality as e(item, n)
                where k.shape = 'schemas'
                union all
               select array[k.keyword, m.name], false, _extend_path(k.at, m.name), m.item
                 from jsonb_each(case k.kind when 'object' then k.argument end) as m(name, item)
                where k.shape = 'named schemas') as c
    )
    select n.pointer, n.parent, n.is_in_place, n.at, n.sub from node as n;
end;
$$;
comment on function pgharness._list_subschemas(jsonb) is
'One row per schema inside a schema, itself included: its JSON pointer, its path for messages, and whether it applies to the same value as its parent. Example: select at from pgharness._list_subschemas(''{"items": true}'');';


create or replace function pgharness._explain_pattern(pattern text) returns text
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    perform '' ~ _explain_pattern.pattern, '' ~ _translate_pattern(_explain_pattern.pattern);
    return null;
exception when invalid_regular_expression then
    return format('is %s, not a regular expression that Postgres reads: %s',
                  _brief_json(to_jsonb(_explain_pattern.pattern)), regexp_replace(sqlerrm, '^[^:]*: ', ''));
end;
$$;
comment on function pgharness._explain_pattern(text) is
'What is wrong with a regular expression, null when it can be used. Example: select pgharness._explain_pattern(''[a-'');';


create or replace function pgharness._explain_argument(shape text, argument jsonb) returns text
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_kind   text    := jsonb_typeof(_explain_argument.argument);
    v_number numeric := case v_kind when 'number' then _explain_argument.argument::numeric end;
    v_types  jsonb   := '["array", "boolean", "integer", "null", "number", "object", "string"]';
    v_wanted text;
begin
    v_wanted := case _explain_argument.shape
        when 'types' then
            case when v_kind not in ('string', 'array') or _explain_argument.argument = '[]'
                      or not v_types @> (jsonb_build_array() || _explain_argument.argument)
                 then 'a type; types are ' || _list_values(v_types) end
        when 'number' then case when v_kind <> 'number' then 'a number' end
        when 'positive number' then case when coalesce(v_number <= 0, true) then 'a number above 0' end
        when 'count' then case when coalesce(v_number < 0 or v_number % 1 <> 0, true) then 'a whole number from 0' end
        when 'boolean' then case when v_kind <> 'boolean' then 'true or false' end
        when 'string' then case when v_kind <> 'string' then 'a string' end
        when 'pattern' then case when v_kind <> 'string' then 'a string' end
        when 'list' then case when v_kind <> 'array' or _explain_argument.argument = '[]' then 'a list of values' end
        when 'schemas' then
            case when v_kind <> 'array' or _explain_argument.argument = '[]' then 'a list of schemas' end
        when 'named schemas' then case when v_kind <> 'object' then 'an object of schemas' end
        when 'names' then
            case when v_kind <> 'array' or _explain_argument.argument @? '$[*] ? (@.type() != "string")'
                 then 'a list of property names' end
        when 'name lists' then
            case when v_kind <> 'object' or exists (
                 select from jsonb_each(case v_kind when 'object' then _explain_argument.argument end) as l(name, item)
                  where _explain_argument('names', l.item) is not null)
                 then 'an object of lists of property names' end
    end;
    return case when _explain_argument.shape = 'unsupported' then 'is not supported, so it would not be enforced'
                when v_wanted is not null then
                    format('is %s, not %s', _brief_json(_explain_argument.argument), v_wanted)
                when _explain_argument.shape = 'pattern' then _explain_pattern(_explain_argument.argument #>> '{}') end;
end;
$$;
comment on function pgharness._explain_argument(text, jsonb) is
'What is wrong with the argument of a keyword of some shape (see _list_keywords), null when nothing. Example: select pgharness._explain_argument(''count'', ''-1'');';


create or replace function pgharness._check_keywords(schema jsonb, at text) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_kind     text  := jsonb_typeof(_check_keywords.schema);
    v_patterns jsonb := _check_keywords.schema -> 'patternProperties';
begin
    if v_kind = 'boolean' then
        return '[]';
    elsif v_kind <> 'object' then
        return jsonb_build_array(_violation(_check_keywords.at, format(
            'is %s, not a schema (an object, true or false)%s', _brief_json(_check_keywords.schema),
            case v_kind when 'array' then '; a list of schemas by position is prefixItems' else '' end)));
    end if;
    return coalesce((
        select jsonb_agg(_violation(f.at, f.problem))
          from (select _extend_path(_check_keywords.at, k.keyword) as at,
                       _explain_argument(k.shape, _check_keywords.schema -> k.keyword) as problem
                  from _list_keywords() as k
                 where _check_keywords.schema ? k.keyword
                 union all
                select _extend_path(_extend_path(_check_keywords.at, 'patternProperties'), p.pattern),
                       _explain_pattern(p.pattern)
                  from jsonb_object_keys(case jsonb_typeof(v_patterns) when 'object' then v_patterns end) as p(pattern)
                 union all
                select _extend_path(_check_keywords.at, w.word), format('is not a keyword, did you mean %s', k.keyword)
                  from jsonb_object_keys(_check_keywords.schema) as w(word)
                  join _list_keywords() as k
                    on k.keyword <> w.word and lower(k.keyword) = lower(translate(w.word, '_-', ''))
                 union all
                select _extend_path(_check_keywords.at, l.low),
                       format('is %s and %s is %s, so nothing fits',
                              _check_keywords.schema -> l.low, l.high, _check_keywords.schema -> l.high)
                  from (values ('minimum', 'maximum', '$.minimum > $.maximum'),
                               ('minimum', 'exclusiveMaximum', '$.minimum >= $.exclusiveMaximum'),
                               ('exclusiveMinimum', 'maximum', '$.exclusiveMinimum >= $.maximum'),
                               ('exclusiveMinimum', 'exclusiveMaximum', '$.exclusiveMinimum >= $.exclusiveMaximum'),
                               ('minLength', 'maxLength', '$.minLength > $.maxLength'),
                               ('minItems', 'maxItems', '$.minItems > $.maxItems'),
                               ('minProperties', 'maxProperties', '$.minProperties > $.maxProperties')
                       ) as l(low, high, is_crossed)
                 where _check_keywords.schema @@ l.is_crossed::jsonpath) as f
         where f.problem is not null), '[]');
end;
$$;
comment on function pgharness._check_keywords(jsonb, text) is
'Problems of the keywords of one schema, not of the schemas inside it. Example: select pgharness._check_keywords(''{"minimum": 2, "maximum": 1}'', ''seed'');';


create or replace function pgharness._check_references(root jsonb) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return (
        with recursive node as materialized (
            select s.pointer, s.parent, s.is_in_place, s.at, s.subschema ->> '$ref' as reference,
                   _split_reference(s.subschema ->> '$ref') as target
              from _list_subschemas(_check_references.root) as s
        ), step(source, target) as (                         -- which schema applies which to the same value
            select n.parent, n.pointer from node as n where n.is_in_place
             union
            select n.pointer, n.target from node as n where n.target is not null
        ), reached(source, target) as (
            select s.source, s.target from step as s
             union
            select r.source, s.target from reached as r join step as s on s.source = r.target
        ), finding(at, problem) as (
            select _extend_path(n.at, '$ref'), 'is ' || _brief_json(to_jsonb(n.reference)) || ', ' || case
                     when n.target is null then 'but only references into this schema (# or #/...) are supported'
                     when not exists (select from node as t where t.pointer = n.target) then
                         'but there is no such schema here'
                     when exists (select from reached as r where r.source = n.pointer and r.target = n.pointer) then
                         'which leads back here without going into the value'
                   end
              from node as n
             where n.reference is not null
        )
        select coalesce(jsonb_agg(_violation(f.at, f.problem)), '[]')
          from finding as f
         where f.problem is not null);
end;
$$;
comment on function pgharness._check_references(jsonb) is
'Problems of all $ref in a schema: foreign, dangling, or endless. Example: select pgharness._check_references(''{"$ref": "#/$defs/Missing"}'');';


create or replace function pgharness.schema_problems(schema jsonb) returns table (path text, problem text)
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_found jsonb;
begin
    select coalesce(jsonb_agg(f.violation), '[]') || _check_references(schema_problems.schema) into v_found
      from _list_subschemas(schema_problems.schema) as s
     cross join lateral jsonb_array_elements(_check_keywords(s.subschema, s.at)) as f(violation);
    if v_found = '[]' then                                   -- only a sound schema can be applied to its own defaults
        select coalesce(jsonb_agg(f.violation), '[]') into v_found
          from _list_subschemas(schema_problems.schema) as s
         cross join lateral jsonb_array_elements(_check_value(
                   schema_problems.schema, s.subschema, s.subschema -> 'default',
                   _extend_path(s.at, 'default'), 0)) as f(violation)
         where jsonb_typeof(s.subschema) = 'object' and s.subschema ? 'default';
    end if;
    return query
    select f.violation ->> 'path', f.violation ->> 'problem' from jsonb_array_elements(v_found) as f(violation);
end;
$$;
comment on function pgharness.schema_problems(jsonb) is
'What is wrong with a JSON Schema: one row per problem, none when schema_violations enforces all of it. Tells wrong arguments, keywords that are not supported or misspelt, limits that exclude each other, bad references and defaults that do not fit. Example: select * from pgharness.schema_problems(''{"properties": {"seed": {"type": "int"}}}'');';


-- Defaults -----------------------------------------------------------------------------------------------------------

create or replace function pgharness._fill_defaults(root jsonb, schema jsonb, value jsonb, depth integer) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_depth   integer := _fill_defaults.depth + 1;
    v_value   jsonb   := _fill_defaults.value;
    v_keyword text;
    v_likely  jsonb;
    v_name    text;
    v_sub     jsonb;
begin
    if v_depth > 150 then
        raise exception 'defaults nest more than 150 levels' using errcode = 'PH002';
    elsif jsonb_typeof(_fill_defaults.schema) <> 'object' or jsonb_typeof(v_value) not in ('object', 'array') then
        return v_value;
    end if;
    if _fill_defaults.schema ? '$ref' then
        v_sub := _follow_reference(_fill_defaults.root, _fill_defaults.schema ->> '$ref');
        v_value := _fill_defaults(_fill_defaults.root, v_sub, v_value, v_depth);
    end if;
    for v_sub in select a.sub from jsonb_array_elements(_fill_defaults.schema -> 'allOf') as a(sub) loop
        v_value := _fill_defaults(_fill_defaults.root, v_sub, v_value, v_depth);
    end loop;
    foreach v_keyword in array array['anyOf', 'oneOf'] loop
        select jsonb_agg(a.sub) into v_likely
          from jsonb_array_elements(_fill_defaults.schema -> v_keyword) as a(sub)
         where _rate_alternative(_fill_defaults.root, a.sub, v_value) = 2;
        if jsonb_array_length(v_likely) = 1 then             -- with several it is not ours to choose
            v_value := _fill_defaults(_fill_defaults.root, v_likely -> 0, v_value, v_depth);
        end if;
    end loop;
    if jsonb_typeof(v_value) = 'object' then
        for v_name, v_sub in
            select p.name, p.sub from jsonb_each(_fill_defaults.schema -> 'properties') as p(name, sub)
        loop
            if v_value ? v_name or v_sub ? 'default' then
                v_value := v_value || jsonb_build_object(v_name, _fill_defaults(
                    _fill_defaults.root, v_sub, coalesce(v_value -> v_name, v_sub -> 'default'), v_depth));
            end if;
        end loop;
    elsif _fill_defaults.schema ? 'items' then
        select coalesce(jsonb_agg(_fill_defaults(_fill_defaults.root, _fill_defaults.schema -> 'items', i.item, v_depth)
                                  order by i.n), '[]') into v_value
          from jsonb_array_elements(v_value) with ordinality as i(item, n);
    end if;
    return v_value;
end;
$$;
comment on function pgharness._fill_defaults(jsonb, jsonb, jsonb, integer) is
'A value with the defaults of a schema inside root filled in. Raises PH002 on a bad reference or past 150 levels. Example: see _apply_defaults.';


create or replace function pgharness._apply_defaults(schema jsonb, value jsonb) returns jsonb
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    return _fill_defaults(coalesce(_apply_defaults.schema, 'true'), coalesce(_apply_defaults.schema, 'true'),
                          _apply_defaults.value, 0);
end;
$$;
comment on function pgharness._apply_defaults(jsonb, jsonb) is
'A value with the defaults of absent properties filled in, in nested objects and lists of objects too; what is there stays. Raises PH002 on a bad reference or past 150 levels. Example: select pgharness._apply_defaults(''{"properties": {"seed": {"default": 1}}}'', ''{}'');';
