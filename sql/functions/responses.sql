-- The response cache: what workers look up and keep, one asker at a time for one question, and what people may delete.

create or replace function pgharness._is_claimed(claim pgharness.response_claims) returns boolean
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select (claim).expires_at > clock() and exists (select from workers as w where w.id = (claim).worker_id and w.status in ('running', 'draining'));
$$;
comment on function pgharness._is_claimed(pgharness.response_claims) is 'Whether a claim counts: its worker lives, and its time is not over.';

create or replace function pgharness._claim_responses(worker_id bigint, keys bytea[], seconds double precision[]) returns bytea[]
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_mine bytea[];
begin
    with claimed as (
        insert into response_claims as c (key, worker_id, expires_at)
        select asked.key, _claim_responses.worker_id, clock() + make_interval(secs => asked.seconds)
          from unnest(_claim_responses.keys, _claim_responses.seconds) as asked (key, seconds)
         where not exists (select from responses as r where r.key = asked.key)
         order by asked.key                             -- as everywhere, lest two wait for each other
        on conflict on constraint response_claims_pkey do update set worker_id = excluded.worker_id, expires_at = excluded.expires_at
            where c.worker_id = excluded.worker_id or not _is_claimed(c)  -- one's own again: whether it was granted may not have been heard
        returning c.key
    )
    select coalesce(array_agg(c.key), '{}') into v_mine from claimed as c;
    -- whose claim was gone by now may have kept its answer meanwhile
    delete from response_claims as c where c.key = any (v_mine) and exists (select from responses as r where r.key = c.key);
    return v_mine;
end;
$$;
comment on function pgharness._claim_responses(bigint, bytea[], double precision[]) is
'Claim those of some questions that nobody asks and that have no answer, each for so many seconds; returns which a worker may ask. What it has claimed before it gets again.';

create or replace function pgharness.seek_responses(worker_id bigint, keys bytea[], claims bytea[] default '{}', seconds double precision[] default '{}')
    returns table (key bytea, state text, answer text, data text, finish_reason text, request_id text, answered_by text, input_tokens integer, output_tokens integer,
                   cached_tokens integer, confidence double precision, composition jsonb, cost_usd numeric)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
declare
    v_mine bytea[] := '{}';
begin
    if cardinality(seek_responses.claims) > 0 then
        v_mine := _claim_responses(seek_responses.worker_id, seek_responses.claims, seek_responses.seconds);
    end if;
    return query
    select asked.key,
           case when r.key is not null then 'found' when asked.key = any (v_mine) then 'mine'
                when exists (select from response_claims as c where c.key = asked.key and _is_claimed(c)) then 'taken' else 'free' end,
           r.answer, r.data, r.finish_reason, r.request_id, r.answered_by, r.input_tokens, r.output_tokens, r.cached_tokens, r.confidence, r.composition, r.cost_usd
      from (select k from unnest(seek_responses.keys) as k union select k from unnest(seek_responses.claims) as k) as asked (key)
      left join responses as r on r.key = asked.key;
end;
$$;
comment on function pgharness.seek_responses(bigint, bytea[], bytea[], double precision[]) is
'For workers: what the response cache has for some questions: found, with the answer; else taken (a worker asks it now, and its answer will be kept) or free. A question among the claims that is neither is claimed for so many seconds: mine; again so if the same worker claims it again, which knows itself what it asks. Example: select * from pgharness.seek_responses(1, array[sha256(''?'')]);';

create or replace function pgharness.release_responses(worker_id bigint, keys bytea[]) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    perform from response_claims as c where c.key = any (release_responses.keys) order by c.key for update;
    delete from response_claims as c where c.key = any (release_responses.keys) and c.worker_id = release_responses.worker_id;
end;
$$;
comment on function pgharness.release_responses(bigint, bytea[]) is
'For workers: give up claims of questions whose calls failed, so that somebody else may ask. Idempotent. Example: select pgharness.release_responses(1, array[sha256(''?'')]);';

create or replace function pgharness._keep_responses(calls jsonb) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_keys bytea[] := array(select distinct c.response_key from jsonb_to_recordset(calls) as c (response_key bytea, response jsonb) where c.response is not null);
begin
    if cardinality(v_keys) = 0 then
        return;
    end if;
    -- answers that turned out to be of no use
    delete from responses as r
     where r.key in (select c.response_key from jsonb_to_recordset(calls) as c (response_key bytea, response jsonb) where (c.response -> 'replaces')::boolean);
    insert into responses (key, model, provider, run_id, answer, data, finish_reason, request_id, answered_by, input_tokens, output_tokens, cached_tokens, confidence,
                           composition, cost_usd, latency_ms)
    select distinct on (c.response_key) c.response_key, m.name, m.provider, (select r.id from runs as r where r.id = c.run_id), c.response ->> 'answer',
           c.response ->> 'data', c.finish_reason, c.request_id, c.answered_by, coalesce((c.response ->> 'input_tokens')::integer, 0),
           coalesce((c.response ->> 'output_tokens')::integer, 0), coalesce((c.response ->> 'cached_tokens')::integer, 0),
           (c.response ->> 'confidence')::double precision, c.composition, coalesce((c.response ->> 'cost_usd')::numeric, 0), c.latency_ms
      from jsonb_to_recordset(calls) as c (run_id bigint, model_id bigint, response_key bytea, response jsonb, finish_reason text, request_id text, answered_by text,
                                           composition jsonb, latency_ms double precision)
      join models as m on m.id = c.model_id
     where c.response is not null
     order by c.response_key
    on conflict on constraint responses_pkey do nothing;
    perform from response_claims as c where c.key = any (v_keys) order by c.key for update;
    delete from response_claims as c where c.key = any (v_keys);
end;
$$;
comment on function pgharness._keep_responses(jsonb) is
'Keep the answers of calls (objects with columns of calls, run_id and response: answer, data, confidence, tokens, cost_usd and replaces) that have none yet, and end the claims of their questions.';

create or replace function pgharness.keep_responses(calls jsonb) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$ select _keep_responses(keep_responses.calls); $$;
comment on function pgharness.keep_responses(jsonb) is
'For workers: keep the answers of calls whose items are not decided yet: of the members of a composite, and of code. Idempotent. Example: select pgharness.keep_responses(''[]'');';

create or replace function pgharness._count_hits(keys bytea[]) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    if cardinality(keys) > 0 then
        perform from responses as r where r.key = any (_count_hits.keys) order by r.key for no key update;
        update responses as r set hit_count = r.hit_count + hit.count, last_hit_at = clock()
          from (select k as key, count(*) from unnest(_count_hits.keys) as k group by k) as hit where r.key = hit.key;
    end if;
end;
$$;
comment on function pgharness._count_hits(bytea[]) is 'Count that answers were given instead of calls; a key counts as often as it is named.';

create or replace function pgharness.purge_responses(older_than interval default null, model text default null) returns bigint
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_count bigint;
begin
    if purge_responses.older_than is null and purge_responses.model is null then
        raise exception 'neither older_than nor model says which answers to delete'
            using errcode = 'PH002', hint = 'For all of them: select pgharness.purge_responses(older_than => ''0 days'');';
    elsif purge_responses.older_than < interval '0' then
        raise exception 'older_than is %: no answer is younger than that', purge_responses.older_than
            using errcode = 'PH002', hint = 'Say how long answers must not have been used: select pgharness.purge_responses(older_than => ''90 days'');';
    elsif purge_responses.model is not null and not exists (select from models as m where m.name = purge_responses.model)
      and not exists (select from responses as r where r.model = purge_responses.model) then
        raise exception 'model "%" does not exist, and no answer of it is kept', purge_responses.model
            using errcode = 'PH001', hint = 'List those that have answers: select model from pgharness.response_savings;';
    end if;
    delete from responses as r
     where (purge_responses.older_than is null or coalesce(r.last_hit_at, r.created_at) <= clock() - purge_responses.older_than)
       and (purge_responses.model is null or r.model = purge_responses.model);
    get diagnostics v_count = row_count;
    return v_count;
end;
$$;
comment on function pgharness.purge_responses(interval, text) is
'Delete answers from the response cache: those not used for so long, of one model or of all; returns how many. Runs that they came from keep their notes, and can no longer be replayed. Raises PH001, PH002 (neither is given, or a negative interval). Example: select pgharness.purge_responses(older_than => ''90 days'');';
