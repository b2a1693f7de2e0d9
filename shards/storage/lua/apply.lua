-- Performs operations on one group, one after the other: stores, numbers, stamps, keeps the
-- history and publishes. Nothing of it is seen half done.
--
-- KEYS: the group's data, head, order and history.
-- ARGV: numbers (the wall clock in ms; the history's limits: events, ms, bytes; the bytes of values
-- that one answer may hold; ms after which an empty group is forgotten; how many operations), an
-- epoch for a group that has none, the group's names as JSON members, the channel of its changes,
-- and the names and arguments of all operations, as their sizes and as one text.
--
-- Returns a text and values, few and large, as clients spend their time on each. The text: the
-- epoch, whether the group began, and for each operation that was performed 0, done; 1, there is
-- nothing to change; 2, too large, and the bytes; 3, the item is not what was expected: it and all
-- that follow were not performed; 4, refused, the value says why. When the group can't be touched
-- at all: false, the key, and its type or an error.

local data, head, order, history = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local next_number = string.gmatch(ARGV[1], '%d+')
local function number_of()
    return tonumber(next_number())
end
local now, events_max, age_ms_max, bytes_max = number_of(), number_of(), number_of(), number_of()
local answer_bytes_max, idle_ms, operations = number_of(), number_of(), number_of()
local names, channel = ARGV[3], ARGV[4]
local asked, next_size, at = ARGV[6], string.gmatch(ARGV[5], '%d+'), 1
local numbers, answer = {}, { '' }

local EVENTS = 'stream::events'
-- Names in it have no colon.
local prefix, stream_name, group_name = string.match(channel,
    '^(.*)broker:{[^}]*}:changes:([^:]*):([^:]*)$')
local stream_channel = prefix .. 'broker:changes:' .. stream_name
local NUMBERED_MAX = 100000 -- items of other writers that get a place at the first touch
local NUMBERED_AT_ONCE = 1000
local ENVELOPE_MIN = 100 -- bytes that an envelope has at least beside its data
local CHANGE_OVERHEAD = 200 -- what a kept change counts beside its data

local function failed(reply)
    return type(reply) == 'table' and reply.err
end

local function untouchable(key, reply)
    if string.sub(reply.err, 1, 9) == 'WRONGTYPE' then
        return { false, key, redis.call('TYPE', key).ok }
    end
    return { false, key, reply.err }
end

local function text_of(number)
    return string.format('%.0f', number)
end

local count = redis.pcall('HLEN', data)
if failed(count) then
    return untouchable(data, count)
end
local known = redis.pcall('HMGET', head, 'epoch', 'seq', 'time', 'order', 'bytes')
if failed(known) then
    return untouchable(head, known)
end
local epoch, seq, time = known[1], tonumber(known[2]) or 0, tonumber(known[3]) or 0
local number, bytes = tonumber(known[4]) or 0, tonumber(known[5]) or 0
local is_new, began_empty, began = not epoch, count == 0, false
local touched, kept, is_read = false, false, false
if is_new then
    epoch, seq = ARGV[2], 0
end

local function take()
    local start = at
    at = at + tonumber(next_size())
    return string.sub(asked, start, at - 1)
end

local function say(number)
    numbers[#numbers + 1] = text_of(number)
end

local function give(value)
    answer[#answer + 1] = value
end

local function refuse(reply)
    say(4)
    give(reply.err)
end

-- Of a change: its number and time, and what the item held.
local function changed(old)
    say(0)
    say(seq)
    say(time)
    give(old)
end

local function tick()
    time = math.max(now, time + 1)
    touched = true
    return time
end

-- Give the items that others wrote their places before the first of our own.
local function number_existing()
    if not is_new then
        return
    end
    is_new = false
    redis.pcall('DEL', history)
    local last = redis.pcall('ZRANGE', order, -1, -1, 'WITHSCORES')
    number = not failed(last) and tonumber(last[2]) or 0
    if count == 0 or count > NUMBERED_MAX then
        return
    end
    local added = { 'NX' }
    for _, item in ipairs(redis.call('HKEYS', data)) do
        number = number + 1
        added[#added + 1] = text_of(number)
        added[#added + 1] = item
        if #added > 2 * NUMBERED_AT_ONCE then
            redis.pcall('ZADD', order, unpack(added))
            added = { 'NX' }
        end
    end
    if #added > 1 then
        redis.pcall('ZADD', order, unpack(added))
    end
end

local function keep(envelope)
    if events_max == 0 then
        return
    end
    if #envelope > bytes_max then
        redis.pcall('DEL', history)
        return
    end
    local length = redis.pcall('RPUSH', history, envelope)
    if failed(length) then
        return
    end
    kept = true
    if length == 1 then
        bytes = 0
    end
    bytes = bytes + #envelope
    while length > 1 and (length > events_max or bytes > bytes_max) do
        bytes = bytes - #redis.call('LPOP', history)
        length = length - 1
    end
end

local function tell(kind, id, value, event_type)
    seq = seq + 1
    local event = kind .. '","data":' .. value .. '}}'
    if event_type and event_type ~= '' then
        event = 'event","event":{"type":' .. event_type .. ',"data":' .. value .. '}}}'
    end
    local envelope = '{"type":"stream","timestamp":' .. text_of(tick()) .. ',' .. names
        .. ',"id":' .. id .. ',"seq":' .. text_of(seq) .. ',"event":{"type":"' .. event
    keep(envelope)
    redis.pcall('PUBLISH', EVENTS, envelope) -- it is stored, whatever becomes of the message
    redis.pcall('PUBLISH', channel, epoch .. ' ' .. envelope)
    redis.pcall('PUBLISH', stream_channel,
        epoch .. ':' .. text_of(seq) .. ':' .. group_name .. ':' .. envelope)
    is_read = false
end

local function put(item, id, value, old)
    number_existing()
    local reply = redis.pcall('HSET', data, item, value)
    if failed(reply) then
        return refuse(reply)
    end
    local kind = 'update'
    if not old then
        kind = 'create'
        if count == 0 then
            began = true
            redis.pcall('DEL', order) -- of items that others deleted
        end
        count, number = count + 1, number + 1
        redis.pcall('ZADD', order, text_of(number), item)
    end
    tell(kind, id, value)
    changed(old)
end

-- Gives the items and their order; true where they are those of the answer before. Returns false
-- when they are too large.
local function give_items()
    if is_read then
        give(true)
        give(true)
        return true
    end
    local found = redis.call('HGETALL', data)
    local total = 0
    for index = 2, #found, 2 do
        total = total + #found[index] + 1
    end
    if total > answer_bytes_max then
        say(2)
        say(total)
        return false
    end
    is_read = true
    local places = redis.pcall('ZRANGE', order, 0, -1)
    give(found)
    give(failed(places) and {} or places)
    return true
end

-- The envelopes after `since`, or nil where they are not all kept.
local function missed(since)
    local wanted = seq - since
    if wanted < 0 or wanted > events_max then
        return nil
    end
    if wanted == 0 then
        return {}
    end
    local found = redis.pcall('LRANGE', history, -wanted, -1)
    if failed(found) or #found ~= wanted then
        return nil
    end
    local size = 0
    for _, envelope in ipairs(found) do
        size = size + #envelope - ENVELOPE_MIN + CHANGE_OVERHEAD
    end
    local first = tonumber(string.match(found[1], '"timestamp":(%d+)') or 0)
    local first_seq = tonumber(string.match(found[1], '"seq":(%d+)') or 0)
    local last_seq = tonumber(string.match(found[wanted], '"seq":(%d+)') or 0)
    if size > bytes_max or first < time - age_ms_max then
        return nil
    end
    if first_seq ~= since + 1 or last_seq ~= seq then
        return nil
    end
    return found
end

local perform = {}

function perform.set()
    local item, id, value = take(), take(), take()
    put(item, id, value, redis.call('HGET', data, item))
end

-- As `set`, if the item is what the caller made the new value of; '' for a missing one.
function perform.swap()
    local item, id, value, expected = take(), take(), take(), take()
    local old = redis.call('HGET', data, item)
    if (old or '') ~= expected then
        say(3)
        return true
    end
    put(item, id, value, old)
end

function perform.check()
    local item, expected = take(), take()
    if (redis.call('HGET', data, item) or '') ~= expected then
        say(3)
        return true
    end
    say(0)
end

function perform.delete()
    local item, id = take(), take()
    local old = redis.call('HGET', data, item)
    if not old then
        return say(1)
    end
    number_existing()
    local reply = redis.pcall('HDEL', data, item)
    if failed(reply) then
        return refuse(reply)
    end
    count = count - 1
    redis.pcall('ZREM', order, item)
    tell('delete', id, pcall(cjson.decode, old) and old or 'null')
    changed(old)
end

function perform.tell()
    local kind, id, value, event_type = take(), take(), take(), take()
    number_existing()
    local reply = redis.pcall('HSET', head, 'epoch', epoch) -- refused before anything is told
    if failed(reply) then
        return refuse(reply)
    end
    tell(kind, id, value, event_type)
    changed(false)
end

function perform.get()
    say(0)
    give(redis.call('HGET', data, take()))
end

function perform.list()
    if give_items() then
        say(0)
    end
end

-- `scope` says what the snapshot is of: `group`, `item`, or nothing that is stored here.
function perform.join()
    local scope, item, since, since_epoch = take(), take(), take(), take()
    number_existing()
    tick()
    local past = since ~= '' and since_epoch == epoch and missed(tonumber(since))
    if past then
        scope = 'nothing'
    end
    if scope == 'group' then
        if not give_items() then
            return
        end
    else
        give(scope == 'item' and redis.call('HGET', data, item))
        give(false)
    end
    give(past or false)
    say(0)
    say(seq)
    say(time)
end

function perform.history()
    local found = redis.pcall('LRANGE', history, 0, -1)
    say(0)
    say(seq)
    give(failed(found) and {} or found)
end

for _ = 1, operations do
    if perform[take()]() then
        break
    end
end

if touched then
    redis.pcall('HSET', head, 'epoch', epoch, 'seq', text_of(seq), 'time', text_of(time),
        'order', text_of(number), 'bytes', text_of(bytes))
    if count == 0 then
        redis.pcall('PEXPIRE', head, text_of(idle_ms))
    elseif began_empty then
        redis.pcall('PERSIST', head)
    end
    if kept then
        redis.pcall('PEXPIRE', history, text_of(age_ms_max + 1))
    end
end
answer[1] = epoch .. (began and ' 1 ' or ' 0 ') .. table.concat(numbers, ' ')
return answer
